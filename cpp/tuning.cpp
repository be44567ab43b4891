#include "tuning.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <locale>
#include <memory>
#include <mutex>
#include <sstream>
#include <vector>

#include "cpu/isa.h"

// The text, line by line; words are separated by blanks, # begins a comment.
//
//   isa NAME                          what follows was measured with this instruction set
//   axis N|D|states VALUE ...         at least two, rising; D = sqrt(K V), states = B Hs / threads
//   factor METHOD BYTES VALUE ...     one for each point, states fastest, then D, then N; "-": not measured
//                                     BYTES: of an element of q, k, v: 2, 4 or 8
namespace lc {
namespace {

constexpr const char* kAxes[] = {"N", "D", "states"};
constexpr const char kDefault[] =
#include "tuning.inc"
    ;

int type_index(Type t) { return t == Type::f64 ? 2 : t == Type::f32 ? 1 : 0; }

}  // namespace

class Tuning {
 public:
  struct Row {
    std::string method;
    std::vector<float> factors[3];  // by type_index; empty: nothing measured
  };
  bool shipped;
  std::vector<double> log2_axis[3];
  std::vector<Row> rows;

  Row& row(const std::string& method) {
    for (Row& r : rows)
      if (r.method == method) return r;
    rows.push_back({method, {}});
    return rows.back();
  }
  size_t points() const { return log2_axis[0].size() * log2_axis[1].size() * log2_axis[2].size(); }
  size_t index(size_t n, size_t d, size_t s) const { return (n * log2_axis[1].size() + d) * log2_axis[2].size() + s; }
};

namespace {

[[noreturn]] void broken(int line, const std::string& why) {
  fail(LC_INVALID, "tuning: line %d: %s", line, why.c_str());
}

double number(const std::string& word, int line) {
  std::istringstream text(word);
  text.imbue(std::locale::classic());  // a program may have set another one
  double x = 0;
  if (!(text >> x) || text.peek() != EOF || !(x > 0) || x > 1e12)
    broken(line, "expected a positive number, got '" + word + "'");
  return x;
}

// What was not measured is taken from the nearest N that was.
void fill_gaps(const Tuning& t, std::vector<float>& f) {
  const size_t n = t.log2_axis[0].size();
  const std::vector<float> given = f;
  for (size_t d = 0; d < t.log2_axis[1].size(); ++d)
    for (size_t s = 0; s < t.log2_axis[2].size(); ++s)
      for (size_t i = 0; i < n; ++i) {
        float& x = f[t.index(i, d, s)];
        for (size_t far = 1; x == 0 && far < n; ++far) {
          if (far <= i) x = given[t.index(i - far, d, s)];
          if (x == 0 && i + far < n) x = given[t.index(i + far, d, s)];
        }
        if (x == 0) x = 1;
      }
}

std::unique_ptr<Tuning> parse(const char* text) {
  auto t = std::make_unique<Tuning>();
  std::istringstream lines(text);
  std::string line, word;
  bool mine = true;
  for (int number_of_line = 1; std::getline(lines, line); ++number_of_line) {
    std::istringstream words(line.substr(0, line.find('#')));
    if (!(words >> word)) continue;
    const std::string kind = word;
    if (!(words >> word)) broken(number_of_line, "expected more after '" + kind + "'");
    if (kind == "isa") {
      mine = word == isa().name;
    } else if (kind == "axis") {
      int axis = 0;
      while (axis < 3 && word != kAxes[axis]) ++axis;
      if (axis == 3) broken(number_of_line, "expected axis N, D or states, got '" + word + "'");
      std::vector<double> values;
      while (words >> word) {
        values.push_back(std::log2(number(word, number_of_line)));
        if (values.size() > 1 && !(values.back() > values[values.size() - 2]))
          broken(number_of_line, "expected rising values, got '" + word + "'");
      }
      if (values.size() < 2) broken(number_of_line, "expected at least two values");
      if (mine && !t->rows.empty()) broken(number_of_line, "expected axes before factors");
      if (mine) t->log2_axis[axis] = values;
    } else if (kind == "factor") {
      const std::string method = word;
      words >> word;
      const int type = word == "8" ? 2 : word == "4" ? 1 : word == "2" ? 0 : -1;
      if (type < 0) broken(number_of_line, "expected 2, 4 or 8 bytes, got '" + word + "'");
      std::vector<float> values;
      while (words >> word) values.push_back(word == "-" ? 0 : float(number(word, number_of_line)));
      if (!mine) continue;
      if (values.size() != t->points())
        broken(number_of_line,
               "expected " + std::to_string(t->points()) + " values, got " + std::to_string(values.size()));
      fill_gaps(*t, values);
      t->row(method).factors[type] = std::move(values);
    } else {
      broken(number_of_line, "expected isa, axis or factor, got '" + kind + "'");
    }
  }
  return t;
}

std::atomic<const Tuning*> current{nullptr};

// Tables are kept for good: a call of another thread may still read an old one, and they are few and small.
void publish(std::unique_ptr<Tuning> t) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Tuning>> all;
  const std::lock_guard<std::mutex> lock(mutex);
  all.push_back(std::move(t));
  current = all.back().get();
}

}  // namespace

const Tuning& tuning() {
  if (!current.load(std::memory_order_acquire)) set_tuning(nullptr);
  return *current.load(std::memory_order_acquire);
}

void set_tuning(const char* text) {
  std::unique_ptr<Tuning> table = parse(text ? text : kDefault);
  table->shipped = !text;
  publish(std::move(table));
}

const char* tuning_source() { return tuning().shipped ? "shipped" : "set"; }

GridPosition locate(const Tuning& t, const Problem& p) {
  GridPosition at = {{}, type_index(p.type), {}};
  const double sequences = double(p.B > 0 ? p.B : 1);
  const double x[3] = {std::log2(std::fmax(1, double(tokens(p)) / sequences)),
                       0.5 * std::log2(double(p.K) * double(p.V)), std::log2(sequences * double(p.Hs) / p.threads)};
  for (int i = 0; i < 3; ++i) {
    const std::vector<double>& axis = t.log2_axis[i];
    if (axis.empty()) continue;
    int c = 0;
    while (c + 2 < int(axis.size()) && x[i] >= axis[size_t(c) + 1]) ++c;
    const double lower = axis[size_t(c)], upper = axis[size_t(c) + 1];
    at.corner[i] = c, at.weight[i] = std::fmin(1, std::fmax(0, (x[i] - lower) / (upper - lower)));
  }
  return at;
}

double correction(const Tuning& t, const char* method, const GridPosition& at) {
  for (const Tuning::Row& row : t.rows) {
    if (row.method != method) continue;
    const std::vector<float>& f = row.factors[at.type];
    if (f.empty()) return 1;
    double sum = 0;
    for (int corner = 0; corner < 8; ++corner) {
      double weight = 1;
      size_t index[3];
      for (int i = 0; i < 3; ++i) {
        const int upper = corner >> i & 1;
        weight *= upper ? at.weight[i] : 1 - at.weight[i];
        index[i] = size_t(at.corner[i] + upper);
      }
      if (weight > 0) sum += weight * double(f[t.index(index[0], index[1], index[2])]);
    }
    return sum;
  }
  return 1;
}

}  // namespace lc
