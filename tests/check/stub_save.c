#include "check.h"
void check_save(void) {}
