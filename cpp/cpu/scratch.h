// scratch.h - the scratch of a call, one piece for each worker. A method's Worker<E> is constructed from (problem,
// arena) and takes its memory from the arena; measuring and cutting are the same code. The problem may be of a type
// that the method derives from Problem.
#pragma once
#include "threads.h"
#include "tile.h"

namespace lc::LC_ISA {
namespace {  // GCC takes no linkage from a template argument: the Workers of two methods would share one function

// The worker of this number, behind the memory of those before it.
template <template <class> class Worker, class E, class P>
Worker<E> cut(const P& p, Arena& arena, int number) {
  for (int i = 0; i < number; ++i) Worker<E>(p, arena);
  return Worker<E>(p, arena);
}

// What so many workers take, in bytes.
template <template <class> class Worker, class P>
size_t scratch_bytes(const P& p, int workers) {
  size_t bytes = 0;
  with_type(p.type, [&](auto e) {
    Arena arena(nullptr);
    cut<Worker, decltype(e)>(p, arena, workers - 1);
    bytes = arena.used();
  });
  return bytes;
}

}  // namespace
}  // namespace lc::LC_ISA
