// The header from C++: functions have C linkage, INIT macros need no designators.
#include "alone.c"
