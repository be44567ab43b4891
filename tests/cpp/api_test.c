/* api_test.c - the whole C ABI, used from C99. Exits with the number of failed checks. */
#include <leetcore/leetcore.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int failures = 0;
#define CHECK(condition)                                                                                \
  do {                                                                                                  \
    if (!(condition)) {                                                                                 \
      ++failures;                                                                                       \
      printf("%s:%d: not so: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, lc_last_error()); \
    }                                                                                                   \
  } while (0)

static int starts_with(const char* text, const char* prefix) { return strncmp(text, prefix, strlen(prefix)) == 0; }

/* One head and two tokens, K = V = 1, gamma = 1/2:
 *   S_1 = 4 * 6 = 24, o_1 = 2 * 24 = 48;  S_2 = 24 / 2 + 5 * 7 = 47, o_2 = 3 * 47 = 141. */
static float q[2] = {2, 3}, k[2] = {4, 5}, v[2] = {6, 7}, o[2], state[1], log_decay[1];
static int64_t shape[4] = {1, 1, 2, 1}, state_shape[4] = {1, 1, 1, 1}, decay_shape[1] = {1};
static lc_tensor tq, tk, tv, to, tstate, tdecay;

static lc_tensor f32(float* data, int32_t ndim, int64_t* dims) {
  lc_tensor t = {NULL, {LC_CPU, 0}, 0, {LC_FLOAT, 32, 1}, NULL, NULL, 0};
  t.data = data;
  t.ndim = ndim;
  t.shape = dims;
  return t;
}

static lc_args tiny(void) {
  lc_args a;
  memset(&a, 0, sizeof a);
  tq = f32(q, 4, shape);
  tk = f32(k, 4, shape);
  tv = f32(v, 4, shape);
  to = f32(o, 4, shape);
  tstate = f32(state, 4, state_shape);
  tdecay = f32(log_decay, 1, decay_shape);
  log_decay[0] = (float)log(0.5);
  o[0] = o[1] = state[0] = -1;
  a.struct_size = sizeof a;
  a.op = LC_FORWARD;
  a.scale = 1;
  a.q = &tq;
  a.k = &tk;
  a.v = &tv;
  a.log_decay = &tdecay;
  a.o = &to;
  a.final_state = &tstate;
  return a;
}

static char memory[1 << 22];

/* Calls lc_workspace, and lc_run with that scratch. */
static lc_status run(lc_args* a) {
  size_t bytes = 0;
  const lc_status status = lc_workspace(a, &bytes);
  if (status != LC_OK) return status;
  if (bytes > sizeof memory - 64) return LC_INTERNAL;
  a->workspace = memory + (64 - (uintptr_t)memory % 64);
  a->workspace_bytes = bytes;
  return lc_run(a);
}

static int untouched(void) { return o[0] == -1 && o[1] == -1 && state[0] == -1; }
static int near(float x, double want) { return fabs(x - want) <= 1e-5 * fabs(want); }

static void values(void) {
  lc_args a = tiny();
  CHECK(run(&a) == LC_OK);
  CHECK(near(o[0], 48) && near(o[1], 141) && near(state[0], 47));

  a = tiny(); /* scale multiplies o and nothing else */
  a.scale = -2;
  CHECK(run(&a) == LC_OK);
  CHECK(near(o[0], -96) && near(o[1], -282) && near(state[0], 47));

  a = tiny(); /* no decay */
  a.log_decay = NULL;
  CHECK(run(&a) == LC_OK);
  CHECK(near(o[0], 48) && near(o[1], 177) && near(state[0], 59));

  a = tiny(); /* decode: both tokens, from S_0 = 2: S_1 = 25, S_2 = 47.5 */
  a.op = LC_DECODE;
  state[0] = 2;
  CHECK(run(&a) == LC_OK);
  CHECK(near(o[0], 50) && near(o[1], 142.5) && near(state[0], 47.5));

  a = tiny(); /* the named method computes the same */
  a.method = "recurrent";
  CHECK(run(&a) == LC_OK);
  CHECK(near(o[0], 48) && near(o[1], 141) && near(state[0], 47));
}

static void statuses(void) {
  lc_args a;
  size_t bytes;

  a = tiny();
  tk.ndim = 3;
  CHECK(run(&a) == LC_INVALID && lc_run(&a) == LC_INVALID && untouched());
  CHECK(starts_with(lc_last_error(), "k: "));

  a = tiny();
  tv.dtype.bits = 16;
  CHECK(run(&a) == LC_DTYPE && lc_run(&a) == LC_DTYPE && untouched());
  CHECK(starts_with(lc_last_error(), "v: "));

  a = tiny();
  a.op = LC_BACKWARD; /* LC_BACKWARD takes no outputs of LC_FORWARD */
  CHECK(run(&a) == LC_INVALID && lc_run(&a) == LC_INVALID && untouched());
  CHECK(starts_with(lc_last_error(), "final_state: "));

  if (strstr(lc_build_info(), "cuda=no")) {
    a = tiny();
    tq.device.type = tk.device.type = tv.device.type = LC_CUDA;
    tdecay.device.type = to.device.type = tstate.device.type = LC_CUDA;
    CHECK(run(&a) == LC_DEVICE && lc_run(&a) == LC_DEVICE && untouched());
    CHECK(*lc_last_error());
  }

  { /* a problem whose cheapest method needs scratch: 1024 tokens */
    enum { N = 1024, D = 64 };
    static float x[N * D], y[N * D];
    int64_t dims[4] = {1, 1, N, D};
    a = tiny();
    a.final_state = NULL;
    tq = tk = tv = f32(x, 4, dims);
    to = f32(y, 4, dims);
    a.method = "parallel";
    y[0] = -1;
    CHECK(lc_workspace(&a, &bytes) == LC_OK && bytes > 64);
    CHECK(lc_run(&a) == LC_MEMORY && starts_with(lc_last_error(), "workspace: "));
    a.workspace = memory + (64 - (uintptr_t)memory % 64);
    a.workspace_bytes = bytes - 1;
    CHECK(lc_run(&a) == LC_MEMORY && starts_with(lc_last_error(), "workspace: "));
    a.workspace_bytes = bytes + 64;
    a.workspace = (char*)a.workspace + 4;
    CHECK(lc_run(&a) == LC_MEMORY && starts_with(lc_last_error(), "workspace: "));
    CHECK(y[0] == -1);
    CHECK(run(&a) == LC_OK && y[0] == 0);
  }

  CHECK(lc_run(NULL) == LC_INVALID && *lc_last_error());
  CHECK(lc_workspace(NULL, &bytes) == LC_INVALID);
  CHECK(lc_explain(NULL, memory, sizeof memory) == LC_INVALID);
  a = tiny();
  CHECK(lc_workspace(&a, NULL) == LC_INVALID && starts_with(lc_last_error(), "bytes: "));
}

static void struct_sizes(void) {
  struct {
    lc_args known;
    char future[64];
  } newer;
  lc_args a = tiny();

  a.struct_size = 0;
  CHECK(run(&a) == LC_INVALID && lc_run(&a) == LC_INVALID && *lc_last_error() && untouched());

  a = tiny(); /* an older caller: memory after its struct is not read */
  CHECK(run(&a) == LC_OK);
  a.struct_size = offsetof(lc_args, stream);
  a.stream = &a;
  o[1] = -1;
  CHECK(lc_run(&a) == LC_OK && near(o[1], 141));

  a = tiny();
  a.struct_size = offsetof(lc_args, o);
  CHECK(lc_run(&a) == LC_INVALID && starts_with(lc_last_error(), "o: ") && untouched());

  memset(&newer, 0, sizeof newer);
  newer.known = tiny();
  newer.known.struct_size = sizeof newer;
  CHECK(run(&newer.known) == LC_OK && near(o[1], 141));
}

static void* other_thread(void* unused) {
  lc_args a = {0};
  (void)unused;
  CHECK(strcmp(lc_last_error(), "") == 0);
  a.struct_size = sizeof a;
  a.op = 77;
  CHECK(lc_run(&a) == LC_INVALID);
  CHECK(strstr(lc_last_error(), "77") != NULL);
  return NULL;
}

static void last_error(void) {
  pthread_t thread;
  char before[1024];
  lc_args a = tiny();
  tv.ndim = 3;
  CHECK(lc_run(&a) == LC_INVALID && starts_with(lc_last_error(), "v: "));
  snprintf(before, sizeof before, "%s", lc_last_error());
  CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
  pthread_join(thread, NULL);
  CHECK(strcmp(lc_last_error(), before) == 0);
  a = tiny();
  CHECK(run(&a) == LC_OK);
  CHECK(strcmp(lc_last_error(), before) == 0);
}

static void costs(void) {
  const char* only_parallel =
      "axis N 1 2\naxis D 1 2\naxis states 1 2\nfactor parallel 4 1e-9 1e-9 1e-9 1e-9 1e-9 1e-9 1e-9 1e-9\n";
  lc_cost cost, part;
  size_t bytes;
  lc_args a = tiny();
  a.method = "recurrent";
  CHECK(lc_predict(&a, &cost, sizeof cost) == LC_OK && untouched());
  CHECK(strcmp(cost.method, "recurrent") == 0 && cost.flop == 2 * 5 && cost.depth == 2);
  CHECK(lc_workspace(&a, &bytes) == LC_OK && cost.workspace == bytes);
  CHECK(cost.least_bytes == 4 * (2 * 4 + 1) && cost.bytes == cost.least_bytes && cost.microseconds > 0);
  memset(&part, 0xff, sizeof part); /* an older caller's struct is shorter */
  CHECK(lc_predict(&a, &part, offsetof(lc_cost, least_bytes)) == LC_OK);
  CHECK(part.flop == cost.flop && part.least_bytes != cost.least_bytes);
  CHECK(lc_predict(NULL, &cost, sizeof cost) == LC_INVALID);
  CHECK(lc_predict(&a, NULL, sizeof cost) == LC_INVALID && starts_with(lc_last_error(), "cost: "));

  a.method = NULL;
  CHECK(lc_set_tuning(only_parallel) == LC_OK);
  CHECK(lc_predict(&a, &cost, sizeof cost) == LC_OK && strcmp(cost.method, "parallel") == 0);
  CHECK(lc_set_tuning("axis") == LC_INVALID && starts_with(lc_last_error(), "tuning: line 1: "));
  CHECK(lc_predict(&a, &cost, sizeof cost) == LC_OK && strcmp(cost.method, "parallel") == 0);
  CHECK(lc_set_tuning(NULL) == LC_OK);
  CHECK(lc_predict(&a, &cost, sizeof cost) == LC_OK && strcmp(cost.method, "parallel") != 0);
}

static void candidates(void) {
  lc_candidate row;
  lc_choice choice;
  lc_cost cost;
  lc_args a = tiny();
  int i, count = 0;
  double best = -1;
  while (lc_method(count)) ++count;
  CHECK(lc_choose(&a, &choice, sizeof choice) == LC_OK);
  CHECK(!strcmp(choice.decided_by, "prediction") && !strcmp(choice.table, "shipped"));
  for (i = 0; i < count; ++i) {
    CHECK(lc_candidate_at(&a, i, &row, sizeof row) == LC_OK);
    CHECK(!strcmp(row.method, lc_method(i)->name) && !strcmp(row.device, lc_method(i)->device));
    if (row.refusal) continue;
    CHECK(row.microseconds == row.model_us * row.correction);
    if (best < 0 || row.microseconds < best) best = row.microseconds;
  }
  CHECK(lc_candidate_at(&a, choice.index, &row, sizeof row) == LC_OK && row.microseconds == best);
  CHECK(lc_predict(&a, &cost, sizeof cost) == LC_OK && cost.flop == row.flop && cost.workspace == row.workspace);
  a.method = row.method;
  CHECK(lc_choose(&a, &choice, sizeof choice) == LC_OK && !strcmp(choice.decided_by, "method"));
  CHECK(lc_candidate_at(&a, count, &row, sizeof row) == LC_INVALID && starts_with(lc_last_error(), "index: "));
  CHECK(lc_candidate_at(&a, -1, &row, sizeof row) == LC_INVALID && starts_with(lc_last_error(), "index: "));
  CHECK(lc_candidate_at(&a, 0, NULL, 8) == LC_INVALID && starts_with(lc_last_error(), "candidate: "));
  CHECK(lc_choose(&a, NULL, 8) == LC_INVALID && starts_with(lc_last_error(), "choice: "));
  a.method = "fast";
  CHECK(lc_choose(&a, &choice, sizeof choice) == LC_INVALID && starts_with(lc_last_error(), "method: "));
  CHECK(strstr(lc_method_serves(0), "forward") && !lc_method_serves(count) && !lc_method_serves(-1));
  CHECK(untouched());
}

static void explain(void) {
  char text[8192], cut[16];
  const lc_method_info* m;
  lc_args a = tiny();
  int i;
  CHECK(lc_explain(&a, text, sizeof text) == LC_OK);
  for (i = 0; (m = lc_method(i)) != NULL; ++i) CHECK(strstr(text, m->name) != NULL);
  for (i = 1; i <= 10; i += 3) {
    memset(cut, 'x', sizeof cut);
    CHECK(lc_explain(&a, cut, (size_t)i) == LC_OK);
    CHECK(strncmp(cut, text, (size_t)i - 1) == 0 && cut[i - 1] == '\0' && cut[i] == 'x');
  }
  CHECK(lc_explain(&a, text, 0) == LC_INVALID && starts_with(lc_last_error(), "text: "));
  CHECK(lc_explain(&a, NULL, 100) == LC_INVALID && starts_with(lc_last_error(), "text: "));
  CHECK(untouched());
}

static void methods(void) {
  int i, n = 0, chunk = 0, recurrent = 0, parallel = 0;
  const lc_method_info* m;
  for (; (m = lc_method(n)) != NULL; ++n) {
    CHECK(*m->name && *m->idea && *m->paper);
    CHECK(!strcmp(m->device, "cpu") || !strcmp(m->device, "cuda"));
    chunk += !strcmp(m->name, "chunk") && !strcmp(m->device, "cpu");
    recurrent += !strcmp(m->name, "recurrent") && !strcmp(m->device, "cpu");
    parallel += !strcmp(m->name, "parallel") && !strcmp(m->device, "cpu");
    for (i = 0; i < n; ++i) CHECK(strcmp(m->name, lc_method(i)->name) || strcmp(m->device, lc_method(i)->device));
  }
  CHECK(chunk == 1 && recurrent == 1 && parallel == 1);
  CHECK(lc_method(-1) == NULL && lc_method(n + 1) == NULL && lc_method(1 << 30) == NULL);
}

static void build(void) {
  static const char* const keys[] = {"version=", "compiler=", "isa=", "isas=", "cuda=", "threads=", "threads_source="};
  char version[64];
  size_t i;
  const char* info = lc_build_info();
  for (i = 0; i < sizeof keys / sizeof *keys; ++i) {
    const char* line = strstr(info, keys[i]);
    CHECK(line && (line == info || line[-1] == '\n') && line[strlen(keys[i])] > ' ');
  }
  CHECK(lc_version() == LC_VERSION);
  snprintf(version, sizeof version, "version=%d.%d.%d\n", LC_VERSION_MAJOR, LC_VERSION_MINOR, LC_VERSION_PATCH);
  CHECK(starts_with(info, version));
}

static void threads(void) {
  const int n = lc_num_threads();
  lc_args a = tiny();
  CHECK(n >= 1);
  lc_set_num_threads(n + 3);
  CHECK(lc_num_threads() == n + 3);
  CHECK(run(&a) == LC_OK && near(o[1], 141));
  lc_set_num_threads(0);
  CHECK(lc_num_threads() == n);
  lc_set_num_threads(-5);
  CHECK(lc_num_threads() == n);
}

static int asked, asked_elsewhere;
static pthread_t caller;
static int answer;
static int ask(void* context) {
  ++*(int*)context;
  asked_elsewhere += !pthread_equal(pthread_self(), caller);
  return answer;
}

/* Work of some tenths of a second ends early when its caller asks for it. */
static void interrupts(void) {
  enum { H = 16, N = 4096, D = 64 };
  float *x = calloc((size_t)H * N * D, sizeof *x), *y = calloc((size_t)H * N * D, sizeof *y);
  float* s = calloc((size_t)H * D * D, sizeof *s);
  int64_t dims[4] = {1, H, N, D}, state_dims[4] = {1, H, D, D};
  lc_args a;
  int i;
  for (i = 0; i < 3; ++i) {
    memset(&a, 0, sizeof a);
    a.struct_size = sizeof a;
    a.scale = 1;
    a.method = "parallel";
    tq = f32(x, 4, dims);
    to = f32(y, 4, dims);
    a.q = a.k = a.v = &tq;
    a.o = &to;
    tstate = f32(s, 4, state_dims);
    if (i == 2) a.final_state = &tstate; /* after a barrier */
    a.interrupt = ask;
    a.interrupt_context = &asked;
    caller = pthread_self();
    answer = i;
    asked = asked_elsewhere = 0;
    y[(size_t)H * N * D - 1] = -1;
    if (i == 2) lc_set_num_threads(3);
    while (asked == 0 && run(&a) == LC_OK) { /* until a call took long enough */
    }
    lc_set_num_threads(0);
    CHECK(asked >= 1 && asked_elsewhere == 0);
    if (i == 0) CHECK(run(&a) == LC_OK && y[(size_t)H * N * D - 1] == 0);
    if (i != 0) CHECK(asked == 1 && starts_with(lc_last_error(), "interrupt: "));
  }
  free(x);
  free(y);
  free(s);
}

static void thread_counts(void) {
  const char* source = "";
  const int all = lc_num_threads();
  lc_args a = tiny();
  CHECK(lc_thread_count(0, &source) == all && *source);
  CHECK(lc_thread_count(1, &source) == 1 && (all == 1 || !strcmp(source, "the caller's framework")));
  CHECK(lc_thread_count(1000, NULL) <= sysconf(_SC_NPROCESSORS_ONLN)); /* never more than the cores */
  lc_set_num_threads(7);
  CHECK(lc_thread_count(1, &source) == 7 && !strcmp(source, "set_num_threads"));
  lc_set_num_threads(2147483647);
  CHECK(lc_num_threads() == 4096);
  lc_set_num_threads(0);
  a.num_threads = -1;
  CHECK(run(&a) == LC_INVALID && starts_with(lc_last_error(), "num_threads: "));
  a.num_threads = 1;
  CHECK(run(&a) == LC_OK && near(o[1], 141));
}

int main(void) {
  values();
  statuses();
  struct_sizes();
  last_error();
  candidates();
  explain();
  costs();
  methods();
  build();
  threads();
  thread_counts();
  interrupts();
  printf(failures ? "%d checks FAILED\n" : "all checks passed\n", failures);
  return failures != 0;
}
