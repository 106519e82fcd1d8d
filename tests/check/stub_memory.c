#include "check.h"
void check_memory(void) {}
