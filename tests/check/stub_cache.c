#include "check.h"
void check_cache(void) {}
