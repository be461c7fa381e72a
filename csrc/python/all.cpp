// The folder as one translation unit. Most of the time of compiling goes into torch's headers,
// which are read once this way.
#include "bindings.cpp"
#include "gatherer.cpp"
#include "grad_norm.cpp"
#include "group_on_gpu.cpp"
#include "new_state.cpp"
#include "param_group.cpp"
#include "stepper.cpp"
