#include "check.h"
void check_bench(void) {}
