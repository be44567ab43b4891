// environment.h - the environment variables that leetcore reads.
#pragma once
#include <string>

namespace lc {

// Every variable is copied once, when the library is loaded. A program that changes its environment
// while another thread computes then causes no race. An unset variable is the empty string.
struct Environment {
  std::string isa, method, num_threads, cufft;  // LEETCORE_ISA, LEETCORE_METHOD, ...
  std::string omp_num_threads, omp_thread_limit;
  bool omp_binds;  // whether an OpenMP runtime pins threads to cores, the calling thread too
};
const Environment& environment();

}  // namespace lc
