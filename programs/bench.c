#include "commands.h"
int command_bench(const options *o) {
    (void)o;
    return usage_error("bench is not built yet");
}
