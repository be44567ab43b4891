// environment.h - the variables of the environment that leetcore reads.
#pragma once
#include <string>

namespace lc {

// Every variable is copied once, when the library is loaded: a program that changes its environment while another
// thread computes then races with nothing. An unset variable is the empty string.
struct Environment {
  std::string isa, method, num_threads, cufft;  // LEETCORE_ISA, LEETCORE_METHOD, LEETCORE_NUM_THREADS, LEETCORE_CUFFT
  std::string omp_num_threads, omp_thread_limit;
  bool omp_binds;  // an OpenMP runtime pins threads to cores, the calling thread among them
};
const Environment& environment();

}  // namespace lc
