// scratch.h - the scratch memory of a call, one piece per worker. A method's Worker<E> is
// constructed from (problem, arena) and takes its memory from the arena, so that the same code
// measures and cuts it. The problem's type may be derived from Problem.
#pragma once
#include "arena.h"
#include "tile.h"

namespace lc::LC_ISA {
namespace {  // GCC takes no linkage from a template argument: two methods whose Workers have one name would share it

// Worker `number`, whose memory follows that of the workers before it.
template <template <class> class Worker, class E, class P>
Worker<E> cut(const P& p, Arena& arena, int number) {
  for (int i = 0; i < number; ++i) Worker<E>(p, arena);
  return Worker<E>(p, arena);
}

// Bytes of scratch of all workers together.
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
