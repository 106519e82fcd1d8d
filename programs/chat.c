#include "commands.h"
int command_chat(const options *o) { (void)o; return 0; }
