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

// The text is read line by line. Blanks separate words, and # begins a comment.
//
//   isa NAME                       the lines below were measured with this instruction set
//   axis N|D|states VALUE ...      two or more rising values; D = sqrt(K V), states = B Hs / threads
//   factor METHOD BYTES VALUE ...  a value per point, states fastest, then D, then N; "-": no value
//                                  BYTES of an element of q, k, v: 2, 4 or 8
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
  text.imbue(std::locale::classic());  // a program may have set another locale
  double x = 0;
  if (!(text >> x) || text.peek() != EOF || !(x > 0) || x > 1e12)
    broken(line, "expected a positive number, got '" + word + "'");
  return x;
}

// Replaces a missing value by that of the nearest N that was measured.
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

// Reads the text of a table. It checks all lines, and keeps those of the instruction set in use.
class Parser {
 public:
  std::unique_ptr<Tuning> parse(const char* text) {
    std::istringstream lines(text);
    std::string word;
    for (std::string line; std::getline(lines, line);) {
      ++number_of_line_;
      std::istringstream words(line.substr(0, line.find('#')));
      if (!(words >> word)) continue;
      const std::string kind = word;
      if (!(words >> word)) fail_here("expected more after '" + kind + "'");
      if (kind == "isa")
        mine_ = word == isa().name;
      else if (kind == "axis")
        axis(word, words);
      else if (kind == "factor")
        factors(word, words);
      else
        fail_here("expected isa, axis or factor, got '" + kind + "'");
    }
    return std::move(table_);
  }

 private:
  [[noreturn]] void fail_here(const std::string& why) const { broken(number_of_line_, why); }

  void axis(const std::string& name, std::istringstream& words) {
    int axis = 0;
    while (axis < 3 && name != kAxes[axis]) ++axis;
    if (axis == 3) fail_here("expected axis N, D or states, got '" + name + "'");
    std::vector<double> values;
    for (std::string word; words >> word;) {
      values.push_back(std::log2(number(word, number_of_line_)));
      if (values.size() > 1 && !(values.back() > values[values.size() - 2]))
        fail_here("expected rising values, got '" + word + "'");
    }
    if (values.size() < 2) fail_here("expected at least two values");
    if (mine_ && !table_->rows.empty()) fail_here("expected axes before factors");
    if (mine_) table_->log2_axis[axis] = values;
  }

  void factors(const std::string& method, std::istringstream& words) {
    std::string word = method;
    words >> word;
    const int type = word == "8" ? 2 : word == "4" ? 1 : word == "2" ? 0 : -1;
    if (type < 0) fail_here("expected 2, 4 or 8 bytes, got '" + word + "'");
    std::vector<float> values;
    while (words >> word) values.push_back(word == "-" ? 0 : float(number(word, number_of_line_)));
    if (!mine_) return;
    if (values.size() != table_->points())
      fail_here("expected " + std::to_string(table_->points()) + " values, got " + std::to_string(values.size()));
    fill_gaps(*table_, values);
    table_->row(method).factors[type] = std::move(values);
  }

  std::unique_ptr<Tuning> table_ = std::make_unique<Tuning>();
  int number_of_line_ = 0;
  bool mine_ = true;  // whether the lines are for the instruction set in use
};

std::atomic<const Tuning*> current{nullptr};

// Makes a table the current one. Tables are never freed: a call of another thread may still read an
// old one, and they are few and small.
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
  std::unique_ptr<Tuning> table = Parser().parse(text ? text : kDefault);
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
    at.corner[i] = c;
    at.weight[i] = std::fmin(1, std::fmax(0, (x[i] - lower) / (upper - lower)));
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
