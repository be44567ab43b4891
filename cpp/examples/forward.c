/* forward.c - the C ABI: two sequences, four query heads that share two key and value heads, and a
 * constant decay. Prints one line, and exits with 1 if the answer differs from a plain loop. */
#include <leetcore/leetcore.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { B = 2, Hq = 4, Hkv = 2, PROMPT = 97, N = 100, K = 16, V = 24 };

static float q[B][Hq][N][K], k[B][Hkv][N][K], v[B][Hkv][N][V], o[B][Hq][N][V];
static float state[B][Hkv][K][V];
static float log_decay[Hkv] = {-0.01f, -0.5f};

static void fill(float* x, size_t n) {
  size_t i;
  for (i = 0; i < n; ++i) x[i] = 2.0f * (float)rand() / (float)RAND_MAX - 1.0f;
}

/* Computes the definition token by token. Returns the largest difference from o and state. */
static double largest_error(void) {
  double worst = 0;
  int b, h, t, i, j;
  for (b = 0; b < B; ++b) {
    for (h = 0; h < Hq; ++h) {
      const int hs = h * Hkv / Hq;
      double S[K][V] = {{0}};
      for (t = 0; t < N; ++t) {
        for (j = 0; j < V; ++j) {
          double sum = 0;
          for (i = 0; i < K; ++i) {
            S[i][j] = exp(log_decay[hs]) * S[i][j] + (double)k[b][hs][t][i] * v[b][hs][t][j];
            sum += q[b][h][t][i] * S[i][j];
          }
          worst = fmax(worst, fabs(sum / K - o[b][h][t][j]));
        }
      }
      for (i = 0; i < K; ++i)
        for (j = 0; j < V; ++j) worst = fmax(worst, fabs(S[i][j] - state[b][hs][i][j]));
    }
  }
  return worst;
}

/* `count` tokens from token `first` on, of an array [B, heads, N, width]. The caller owns shape and
 * strides. */
static lc_tensor tokens(void* data, int64_t shape[4], int64_t strides[4], int64_t heads, int64_t width, int64_t first,
                        int64_t count) {
  lc_tensor t = {NULL, {LC_CPU, 0}, 4, {LC_FLOAT, 32, 1}, NULL, NULL, 0};
  shape[0] = B;
  shape[1] = heads;
  shape[2] = count;
  shape[3] = width;
  strides[0] = heads * N * width;
  strides[1] = N * width;
  strides[2] = width;
  strides[3] = 1;
  t.data = data;
  t.shape = shape;
  t.strides = strides;
  t.byte_offset = sizeof(float) * (uint64_t)(first * width);
  return t;
}

/* Runs one op. Both ops write the state, and LC_DECODE reads it first. */
static lc_status run(lc_op op, int64_t first, int64_t count) {
  int64_t shape[4][4], strides[4][4], decay_shape[] = {Hkv}, state_shape[] = {B, Hkv, K, V};
  const lc_tensor tq = tokens(q, shape[0], strides[0], Hq, K, first, count);
  const lc_tensor tk = tokens(k, shape[1], strides[1], Hkv, K, first, count);
  const lc_tensor tv = tokens(v, shape[2], strides[2], Hkv, V, first, count);
  const lc_tensor to = tokens(o, shape[3], strides[3], Hq, V, first, count);
  const lc_tensor tg = {log_decay, {LC_CPU, 0}, 1, {LC_FLOAT, 32, 1}, decay_shape, NULL, 0}; /* NULL strides: dense */
  const lc_tensor ts = {state, {LC_CPU, 0}, 4, {LC_FLOAT, 32, 1}, state_shape, NULL, 0};
  lc_args args = {0};
  lc_status status;
  char* memory;

  args.struct_size = sizeof args;
  args.op = op;
  args.scale = 1.0 / K;
  args.q = &tq;
  args.k = &tk;
  args.v = &tv;
  args.log_decay = &tg;
  args.o = &to;
  args.final_state = &ts;
  status = lc_workspace(&args, &args.workspace_bytes);
  if (status != LC_OK) return status;
  memory = malloc(args.workspace_bytes + 64); /* its address must be a multiple of 64 bytes */
  if (!memory) return LC_MEMORY;
  args.workspace = memory + (64 - (uintptr_t)memory % 64);
  status = lc_run(&args);
  free(memory);
  return status;
}

int main(void) {
  double error;
  fill(&q[0][0][0][0], sizeof q / sizeof(float));
  fill(&k[0][0][0][0], sizeof k / sizeof(float));
  fill(&v[0][0][0][0], sizeof v / sizeof(float));
  if (run(LC_FORWARD, 0, PROMPT) != LC_OK || run(LC_DECODE, PROMPT, N - PROMPT) != LC_OK) {
    fprintf(stderr, "%s\n", lc_last_error());
    return 1;
  }
  error = largest_error();
  printf("forward: leetcore %d.%d.%d, largest difference from a plain loop %.1e\n", lc_version() / 10000,
         lc_version() / 100 % 100, lc_version() % 100, error);
  return error < 1e-5 ? 0 : 1;
}
