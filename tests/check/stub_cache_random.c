#include "check.h"
void check_cache_random(void) {}
