// The folder as one translation unit, see ../python/all.cpp.
#include "flattener.cpp"
#include "op.cpp"
