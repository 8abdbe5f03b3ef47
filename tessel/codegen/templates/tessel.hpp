// What generated C++ kernels call. No standard header is read, so that a kernel compiles in a moment.
#pragma once
#include "base.hpp"
#include "scalars.hpp"
#include "functions.hpp"
#include "vectors.hpp"
#include "vector_functions.hpp"
#include "vector_storage.hpp"
#include "squares.hpp"
