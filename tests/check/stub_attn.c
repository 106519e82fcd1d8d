#include "check.h"
void check_attn(void) {}
