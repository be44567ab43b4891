/* leetcore.h - the C ABI of leetcore: causal linear attention with exponential decay.
 *
 *     S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T        S in R^{K x V}
 *     o_t = scale * S_t^T q_t                           (token t itself counts, with weight 1)
 *
 * There are three operations: the forward pass (LC_FORWARD), its gradients (LC_BACKWARD), and
 * decoding, which takes a few tokens at a time and updates states in place (LC_DECODE). A call
 * fills an lc_args, asks lc_workspace how much scratch it needs, and calls lc_run. The library
 * keeps no state between calls, allocates no tensors, never prints, never aborts and throws
 * nothing. Every function may be called from any number of threads at once.
 *
 * On a GPU (tensors with device {LC_CUDA, i}) lc_run puts kernels on lc_args.stream and returns. It
 * allocates nothing, waits for nothing and reads no tensor on the host, so a CUDA graph may capture
 * it. (The method fft keeps cuFFT's plans: it may be captured after it has run once with the same
 * shapes.) The current device does not matter and does not change. All tensors are on one device,
 * except that a rank-0 log_decay is on the host and is read at once. All memory, the workspace
 * included, stays valid until the stream has done the work.
 */
#ifndef LEETCORE_H
#define LEETCORE_H
#include <stddef.h>
#include <stdint.h>

#define LC_VERSION_MAJOR 0
#define LC_VERSION_MINOR 1
#define LC_VERSION_PATCH 0
#define LC_VERSION (LC_VERSION_MAJOR * 10000 + LC_VERSION_MINOR * 100 + LC_VERSION_PATCH)

#if defined(_WIN32)
#define LC_API
#else
#define LC_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum lc_status {
  LC_OK = 0,
  LC_INVALID = 1,     /* the arguments contradict the contract; nothing was written           */
  LC_UNSUPPORTED = 2, /* valid, but no method serves it, or the named one does not; nothing was written */
  LC_DEVICE = 3,      /* the device is missing, too old or not in this build, or a kernel did not start: the outputs
                         are undefined */
  LC_MEMORY = 4,      /* the workspace is missing or too small; nothing was written             */
  LC_INTERNAL = 5,    /* a bug in leetcore                                                     */
  LC_DTYPE = 6,       /* a tensor has a dtype that is not allowed; nothing was written          */
  LC_INTERRUPTED = 7  /* lc_args.interrupt asked for the end of the call: the outputs are undefined */
} lc_status;

typedef enum lc_op { LC_FORWARD = 0, LC_BACKWARD = 1, LC_DECODE = 2 } lc_op;

/* lc_args.flags */
enum {
  LC_LAYOUT_BNHD = 1, /* tensors with tokens and heads are [B, N, H, ...] instead of [B, H, N, ...] */
  LC_ALLOW_TF32 = 2,  /* float32 products may be rounded to tf32 on matrix units (GPU only)         */
  LC_DT_SOFTPLUS = 4  /* the length of a token is softplus(dt + dt_bias) instead of dt + dt_bias    */
};

/* lc_tensor has the memory layout and the codes of DLPack's DLTensor: a pointer to either may be
 * passed as the other. */
enum { LC_CPU = 1, LC_CUDA = 2 };                              /* lc_device.type */
enum { LC_INT = 0, LC_UINT = 1, LC_FLOAT = 2, LC_BFLOAT = 4 }; /* lc_dtype.code  */

typedef struct lc_device {
  int32_t type, id;
} lc_device;

typedef struct lc_dtype {
  uint8_t code, bits;
  uint16_t lanes;
} lc_dtype;

typedef struct lc_tensor {
  void* data;
  lc_device device;
  int32_t ndim;
  lc_dtype dtype;
  int64_t* shape;       /* not written */
  int64_t* strides;     /* in elements, not written; NULL: dense row-major */
  uint64_t byte_offset; /* the distance of the first element from data, in bytes */
} lc_tensor;

/* The arguments of a call. Initialise them with zeros, set struct_size, and fill the members that
 * the call needs: for every pointer NULL means "absent".
 *
 * Sizes: B sequences, N tokens, K key dim, V value dim. There are H = max(Hq, Hk, Hv) heads; each
 * of Hq, Hk, Hv divides H, and head h reads q head h * Hq / H (k and v alike). There are Hs =
 * max(Hk, Hv) states and decays per sequence; each of Hk, Hv divides Hs. The shapes below are those
 * of the default layout; LC_LAYOUT_BNHD swaps the axes of heads and tokens in every tensor that has
 * both. Any strides are allowed if the last dimension of q, k, v and o is contiguous, and one of the
 * last two dimensions of a state.
 *
 * Dtypes: q, k, v and o have the same dtype, float64, float32, float16 or bfloat16. States are
 * float64 with float64 inputs and float32 otherwise; LC_DECODE also takes float16 and bfloat16
 * pools, which are rounded once per call. log_decay is float32, or float64 with float64 inputs.
 *
 * LC_BACKWARD reads the inputs of LC_FORWARD and the gradients of its outputs, d_o and
 * d_final_state (NULL means zeros; one of them is given). It writes those of d_q, d_k, d_v,
 * d_log_decay and d_initial_state that are not NULL. A gradient has the shape, the dtype and the
 * rules of the tensor in its name; o and final_state must be NULL. Where several heads share a head
 * of q, k or v, or tokens, heads or sequences share a decay, the gradient is the sum. d_log_decay
 * is 0 where log_decay is -inf. The gradients do not depend on the method of the forward pass.
 *
 * Mamba-2 (arXiv:2405.21060) is the same operator with a length d per token, a skip and a gate:
 *
 *     d_t = clamp(dt_t + dt_bias, dt_min, dt_max)       LC_DT_SOFTPLUS: clamp(softplus(dt_t + dt_bias), ...)
 *     S_t = exp(d_t log_decay) S_{t-1} + d_t k_t v_t^T
 *     o_t = (scale * S_t^T q_t + skip * v_t) * silu(gate_t)         silu(z) = z / (1 + exp(-z))
 *
 * q is C, k is B, v is x, log_decay is A and skip is D of that paper. A length of 0 hides the token
 * from the state. Lengths are computed in float64 from the values of dt. Where log_decay is -inf,
 * d_dt has no part that comes through the decay. The gradients of skip and gate are the caller's:
 * LC_BACKWARD does not take them. */
typedef struct lc_args {
  uint32_t struct_size; /* sizeof(lc_args): an older, shorter struct is widened with zeros */
  int32_t op;           /* lc_op */
  const char* method;   /* NULL or "auto": the cheapest method that serves the problem */
  double scale;         /* 0 is 0, not "default": write 1 for none */
  uint32_t flags;
  uint32_t reserved;              /* 0 */
  const lc_tensor* q;             /* [B, Hq, N, K] */
  const lc_tensor* k;             /* [B, Hk, N, K] */
  const lc_tensor* v;             /* [B, Hv, N, V] */
  const lc_tensor* log_decay;     /* natural log, <= 0, -inf allowed: [], [Hs], [B, Hs], or one per token, [B, Hs, N].
                                     A rank-0 tensor is read on the host. Absent: no decay */
  const lc_tensor* initial_state; /* [B, Hs, K, V] ([S, Hs, K, V] with cu_seqlens). Absent: zeros */
  const lc_tensor* state_indices; /* LC_DECODE: int32 or int64 [B], the slot of each sequence in final_state. -1 skips a
                                     sequence: its rows of o become 0. Absent: sequence b uses slot b */
  const lc_tensor* cu_seqlens;    /* not LC_DECODE: int32 or int64 [S + 1], the start offsets of S sequences that are
                                     concatenated along the token axis: 0 = c_0 <= ... <= c_S = N. B is 1 */
  const lc_tensor* o;             /* [B, H, N, V], written; not LC_BACKWARD */
  const lc_tensor* final_state; /* LC_FORWARD: [B, Hs, K, V] ([S, ...] with cu_seqlens), written; may be initial_state.
                                   LC_DECODE: the pool [slots, Hs, K, V], read and updated in place */
  const lc_tensor* d_o;         /* LC_BACKWARD: [B, H, N, V], read */
  const lc_tensor* d_final_state;   /* [B, Hs, K, V] ([S, ...] with cu_seqlens), read */
  const lc_tensor* d_q;             /* [B, Hq, N, K], written like the gradients that follow */
  const lc_tensor* d_k;             /* [B, Hk, N, K] */
  const lc_tensor* d_v;             /* [B, Hv, N, V] */
  const lc_tensor* d_log_decay;     /* shaped like log_decay, which must not be absent */
  const lc_tensor* d_initial_state; /* [B, Hs, K, V]; initial_state may be absent */
  void* workspace; /* scratch for this call alone, on the device of the tensors; aligned to 64 bytes (GPU: 256) */
  size_t workspace_bytes;          /* the size of workspace: lc_workspace writes how much the call needs */
  void* stream;                    /* cudaStream_t of the tensors' device; must be NULL on the CPU */
  int32_t num_threads;             /* threads of the caller's framework, 0: not known. See lc_num_threads */
  int (*interrupt)(void* context); /* NULL, or a function that the calling thread calls now and then during a long call
                                      on the CPU; an answer other than 0 ends the call with LC_INTERRUPTED */
  void* interrupt_context;         /* the argument of interrupt */
  const lc_tensor* dt;             /* [B, Hs, N], the dtype of q or float32. Then log_decay is not [B, Hs, N] */
  const lc_tensor* dt_bias;        /* [Hs], the dtype of q or float32. Absent: 0 */
  double dt_min, dt_max;           /* 0 <= dt_min <= dt_max; dt_max 0: infinity */
  const lc_tensor* skip;           /* [H] or [H, V], the dtype of q or float32. Absent: 0 */
  const lc_tensor* gate;           /* [B, H, N, V], the dtype of q. Absent: no gate */
  const lc_tensor* d_dt;           /* LC_BACKWARD: shaped like dt, written */
} lc_args;

/* Runs the call. Everything is validated before anything is written, except values on a GPU.
 * Kernels never access memory outside the tensors, whatever the values. On a GPU the caller must
 * guarantee, for correct results:
 *
 * - log_decay is <= 0 and not NaN. Otherwise the results of that head of that sequence are
 *   undefined from that token on.
 * - cu_seqlens is as above. Offsets are clamped to [0, N], and an end before its start makes an
 *   empty sequence. Rows of o in no sequence are not written; rows in several sequences are
 *   undefined.
 * - state_indices name no slot twice. Otherwise the states and results of these sequences are
 *   undefined. A slot outside the pool skips its sequence, as -1 does. */
LC_API lc_status lc_run(const lc_args* args);

/* Writes the scratch that lc_run needs for these arguments, in bytes. If another thread then
 * changes the number of threads or the tuning table, lc_run may need more: it returns LC_MEMORY,
 * and the caller asks again. lc_workspace validates shapes, dtypes, strides and devices, and reads
 * no tensor's values. o may be absent, so that a caller can validate a call before it allocates o.
 */
LC_API lc_status lc_workspace(const lc_args* args, size_t* bytes);

/* The cost of a call, by the method that lc_args.method names or that "auto" chooses. */
typedef struct lc_cost {
  const char* method;
  double flop;         /* multiplications and additions of matrix products and of updates of states; weights and
                          masks, a few per cent more, are left out */
  double least_bytes;  /* bytes of every operand, read or written once */
  double bytes;        /* bytes of operands as often as the method reads or writes them, and of states in memory */
  uint64_t workspace;  /* scratch in bytes, as lc_workspace writes it */
  double depth;        /* serial depth: the number of products and updates that must wait for one another */
  double microseconds; /* predicted, on this machine with this number of threads */
} lc_cost;

/* Writes the first size bytes of the cost: pass sizeof(lc_cost). Like lc_workspace, it reads no
 * tensor's values. */
LC_API lc_status lc_predict(const lc_args* args, lc_cost* cost, size_t size);

/* The answer of one method to a call. */
typedef struct lc_candidate {
  const char *method, *device;
  const char* refusal; /* why the method does not serve the call; NULL: it does. With a refusal all others are 0 */
  const char* bound;   /* the largest part of the prediction: "compute", "memory" or "overhead" (launches, wake-ups) */
  double flop, least_bytes, bytes, depth; /* as in lc_cost */
  uint64_t workspace;                     /* as in lc_cost */
  double model_us;                        /* microseconds, predicted by the model of the method */
  double correction;                      /* measured over predicted time, from the tuning table; 1: not measured */
  double microseconds;                    /* model_us * correction */
} lc_candidate;

/* Writes what the method lc_method(index) answers, the first size bytes of it: pass
 * sizeof(lc_candidate). Like lc_workspace, it reads no tensor's values, and args->method does not
 * matter. */
LC_API lc_status lc_candidate_at(const lc_args* args, int index, lc_candidate* candidate, size_t size);

/* The method that a call takes, and why. */
typedef struct lc_choice {
  int32_t index;          /* of the method, as in lc_method */
  const char* decided_by; /* "method": lc_args.method names it; "LEETCORE_METHOD": that variable does; "only": no other
                             method serves the call; "prediction": its predicted time is the shortest */
  const char* table;      /* the tuning table: "shipped", or "set" by lc_set_tuning */
} lc_choice;

/* Writes the first size bytes of the choice: pass sizeof(lc_choice). Fails as lc_workspace does. */
LC_API lc_status lc_choose(const lc_args* args, lc_choice* choice, size_t size);

/* Writes the choice and all candidates as text: a first line, and then one line per method. The
 * text is NUL-terminated and takes at most size bytes; a longer text is cut. */
LC_API lc_status lc_explain(const lc_args* args, char* text, size_t size);

/* Replaces, for the whole process, the table of measured times by which "auto" corrects its
 * predictions. NULL restores the shipped table. `leetcore tune` writes such a table for a machine;
 * the grammar is in cpp/tuning.cpp. */
LC_API lc_status lc_set_tuning(const char* text);

typedef struct lc_method_info {
  const char *name, *device; /* "chunk", "cpu" */
  const char *idea, *paper;  /* a sentence, a source */
} lc_method_info;

LC_API const lc_method_info* lc_method(int index); /* in the order of the table; NULL past its end */

/* The features that a method declares, as words with blanks between them; NULL past the end of the
 * table. A call that asks for another feature is refused. The words: forward, backward, decode;
 * float64, float32, float16, bfloat16; no_decay, decay_per_head, decay_per_token; packed
 * (cu_seqlens), grouped_heads (Hq, Hk, Hv that differ), initial_state, final_state; state_indices
 * and short_states (float16 and bfloat16 pools) of LC_DECODE; decay_gradients (d_log_decay);
 * token_lengths (dt), skip, gate, transposed_states (states whose key dimension is contiguous). */
LC_API const char* lc_method_serves(int index);

/* ---- the causal convolution ------------------------------------------------------------------
 *
 *     u_t = bias + sum_{i < W} weight_i x_{t-W+1+i}        for each of D channels
 *     y_t = u_t, or u_t / (1 + exp(-u_t)) with LC_CONV_SILU
 *
 * The last L inputs before token 0 are initial_state; inputs before them are 0. The last L inputs,
 * of initial_state followed by x, are final_state. */

/* lc_conv_args.flags */
enum { LC_CONV_SILU = 1 /* y = silu(u) */ };

/* The arguments of a convolution, filled like lc_args. Sizes: B sequences of N tokens, D channels,
 * 2 <= W <= 8, L >= W - 1. Any strides are allowed. Calls are fast where the tokens or the channels
 * of x, y and their gradients are contiguous.
 *
 * Dtypes: x and y have the same dtype, float64, float32, float16 or bfloat16. weight, bias and
 * states each have the dtype of x or float32; with float64 inputs they are float64. All states of a
 * call have one dtype and one L. Sums are in float32, or in float64 for float64.
 *
 * LC_BACKWARD reads the inputs of LC_FORWARD and the gradients of its outputs, d_y and
 * d_final_state (NULL means zeros; one of them is given). It writes those of d_x, d_weight, d_bias
 * and d_initial_state that are not NULL; y and final_state must be NULL. A gradient has the shape,
 * the dtype and the rules of the tensor in its name. */
typedef struct lc_conv_args {
  uint32_t struct_size;             /* sizeof(lc_conv_args) */
  int32_t op;                       /* lc_op: LC_DECODE continues sequences by N <= 64 tokens, in a pool of states */
  uint32_t flags;                   /* LC_CONV_SILU or 0 */
  uint32_t reserved;                /* 0 */
  const lc_tensor* x;               /* [B, D, N] */
  const lc_tensor* weight;          /* [D, W] */
  const lc_tensor* bias;            /* [D]. Absent: zeros */
  const lc_tensor* initial_state;   /* not LC_DECODE: [B, D, L] ([S, D, L] with cu_seqlens). Absent: zeros */
  const lc_tensor* state_indices;   /* LC_DECODE: as in lc_args; the rows of y of a skipped sequence become 0 */
  const lc_tensor* cu_seqlens;      /* not LC_DECODE: as in lc_args */
  const lc_tensor* y;               /* [B, D, N], written; not LC_BACKWARD */
  const lc_tensor* final_state;     /* LC_FORWARD: [B, D, L] ([S, ...] with cu_seqlens), written; may be initial_state.
                                     LC_DECODE: the pool [slots, D, L], read and updated in place */
  const lc_tensor* d_y;             /* LC_BACKWARD: [B, D, N], read */
  const lc_tensor* d_final_state;   /* [B, D, L] ([S, ...] with cu_seqlens), read */
  const lc_tensor* d_x;             /* [B, D, N], written like the gradients that follow */
  const lc_tensor* d_weight;        /* [D, W] */
  const lc_tensor* d_bias;          /* [D]; bias may be absent, d_bias then has the dtype of weight */
  const lc_tensor* d_initial_state; /* [B, D, L]; initial_state may be absent */
  void* workspace;                  /* from here on, the members are those of lc_args */
  size_t workspace_bytes;
  void* stream;
  int32_t num_threads;
  int (*interrupt)(void* context);
  void* interrupt_context;
} lc_conv_args;

/* Runs the convolution on the CPU. Tensors on a GPU are LC_UNSUPPORTED. */
LC_API lc_status lc_conv_run(const lc_conv_args* args);

/* Writes the scratch that lc_conv_run needs, in bytes, as lc_workspace does: it reads no tensor's
 * values, and y may be absent. It accepts tensors on a GPU, so that a caller with kernels of its
 * own there can validate a call; the scratch is then 0. */
LC_API lc_status lc_conv_workspace(const lc_conv_args* args, size_t* bytes);

/* ---- errors, facts and threads --------------------------------------------------------------- */

/* The sentence of the last failing call of this thread; "" if no call failed. It is valid until the
 * next failing call. */
LC_API const char* lc_last_error(void);
LC_API int lc_version(void); /* LC_VERSION of the library that was loaded */

/* Facts of the build and of the process as "key=value" lines: version, compiler, isa (in use), isas
 * (compiled), cuda, threads and threads_source (lc_thread_count). The instruction set is the best
 * that both the build and the machine have, or the one that LEETCORE_ISA names. */
LC_API const char* lc_build_info(void);

/* Threads of the CPU methods. The first source that applies decides, at the beginning of each call:
 *
 * 1. one thread inside a parallel region of the process's OpenMP runtime;
 * 2. lc_set_num_threads(n), for the whole process, 1 <= n <= 4096; n < 1 takes the setting back;
 * 3. LEETCORE_NUM_THREADS;
 * 4. lc_args.num_threads, else omp_get_max_threads() of the process's OpenMP runtime, else
 *    OMP_NUM_THREADS; each is limited by OMP_THREAD_LIMIT and by 5;
 * 5. the cores that the affinity of the calling thread allows, limited by the CPU quota of the
 *    control groups, rounded up.
 *
 * In a process that has loaded an OpenMP runtime (torch brings one), leetcore runs on the threads
 * of that runtime, since idle threads of two pools would compete for the cores. In other processes,
 * in a forked child, and where the runtime could not create its threads, leetcore has a pool of its
 * own. The first call that needs the pool creates its threads; they wait for the next call, and
 * follow the affinity of the calling thread. A call uses fewer threads where one cannot be created,
 * and where calls at the same time share the pool. The results of a method do not depend on the
 * number of threads. */
LC_API void lc_set_num_threads(int n);
LC_API int lc_num_threads(void); /* lc_thread_count(0, NULL) */

/* Returns the number of threads of a call with lc_args.num_threads = framework. Unless source is
 * NULL, *source becomes the source of the number in a few words. */
LC_API int lc_thread_count(int32_t framework, const char** source);

#ifdef __cplusplus
}
#endif
#endif
