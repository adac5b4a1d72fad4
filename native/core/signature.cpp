#include "core/signature.h"

#include <algorithm>
#include <cctype>

namespace limbeck {

const char* name_of(DType t) {
  constexpr const char* names[] = {"f32", "bf16", "i32", "u8", "f64"};
  return names[static_cast<size_t>(t)];
}

std::string shape_text(const View& v) {
  std::string s = "[";
  for (int i = 0; i < v.rank; ++i) {
    if (i) s += ' ';
    s += std::to_string(v.dims[i]);
  }
  return s + "]";
}

namespace {

constexpr size_t kMaxSymbols = 32;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) { sig_.text = text; }

  Signature run() {
    sig_.op = word();
    expect('(');
    while (!take(')')) {
      argument();
      if (!take(',')) { expect(')'); break; }
    }
    expect('-');
    expect('>');
    blanks();
    if (at_ != text_.size()) {
      do output();
      while (take(','));
    }
    if (at_ != text_.size()) fail("text after the last output");
    if (sig_.in.size() > kMaxTensors || sig_.out.size() > kMaxTensors || sig_.scalars.size() > kMaxScalars || sig_.symbols.size() > kMaxSymbols)
      fail("more tensors, scalars or dims than a call can carry");
    return std::move(sig_);
  }

 private:
  [[noreturn]] void fail(const std::string& why) {
    throw Error(ErrorKind::internal, "ERR_SIGNATURE",
                "signature '" + std::string(text_) + "': " + why + " at character " + std::to_string(at_));
  }
  void blanks() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  bool take(char c) {
    blanks();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    blanks();
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(std::string("expected '") + c + "'");
  }
  std::string word() {
    blanks();
    const size_t from = at_;
    while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '_')) ++at_;
    if (from == at_) fail("expected a name");
    std::string w(text_.substr(from, at_ - from));
    blanks();
    return w;
  }
  int64_t symbol(const std::string& name) {
    auto it = std::find(sig_.symbols.begin(), sig_.symbols.end(), name);
    if (it == sig_.symbols.end()) it = sig_.symbols.insert(it, name);
    return it - sig_.symbols.begin();
  }
  TensorSpec tensor(std::string name) {
    TensorSpec spec;
    spec.name = std::move(name);
    while (!take(']')) {
      if (take('*')) {
        if (!spec.dims.empty()) fail("'*' must come first");
        spec.dims.push_back({Dim::star, 0});
        continue;
      }
      const std::string w = word();
      if (std::isdigit(static_cast<unsigned char>(w[0])))
        spec.dims.push_back({Dim::fixed, std::stoll(w)});
      else
        spec.dims.push_back({Dim::symbol, symbol(w)});
    }
    if (take(':')) {
      const std::string w = word();
      if (w == "float") spec.dtype = DTypeRule::any_float;
      else if (w == "f32") spec.dtype = DTypeRule::f32;
      else if (w == "bf16") spec.dtype = DTypeRule::bf16;
      else if (w == "i32") spec.dtype = DTypeRule::i32;
      else if (w == "u8") spec.dtype = DTypeRule::u8;
      else if (w == "f64") spec.dtype = DTypeRule::f64;
      else fail("unknown dtype '" + w + "'");
    }
    for (;;) {
      if (take('?')) spec.optional = true;
      else if (take('&')) spec.in_place = true;
      else if (take('+')) spec.accumulates = true;
      else return spec;
    }
  }
  void argument() {
    std::string name = word();
    if (take('[')) {
      sig_.arguments.push_back({name, false, static_cast<int>(sig_.in.size())});
      sig_.in.push_back(tensor(std::move(name)));
    } else {
      sig_.arguments.push_back({name, true, static_cast<int>(sig_.scalars.size())});
      sig_.scalars.push_back(std::move(name));
    }
  }
  void output() {
    std::string name = word();
    if (take('=')) {
      sig_.aliases.emplace_back(std::move(name), word());
      return;
    }
    expect('[');
    sig_.out.push_back(tensor(std::move(name)));
  }

  std::string_view text_;
  size_t at_ = 0;
  Signature sig_;
};

bool fits(DTypeRule rule, DType t, DType compute) {
  switch (rule) {
    case DTypeRule::compute: return t == compute;
    case DTypeRule::f32: return t == DType::f32;
    case DTypeRule::any_float: return t == DType::f32 || t == DType::bf16;
    case DTypeRule::bf16: return t == DType::bf16;
    case DTypeRule::i32: return t == DType::i32;
    case DTypeRule::u8: return t == DType::u8;
    case DTypeRule::f64: return t == DType::f64;
  }
  return false;
}
const char* name_of(DTypeRule rule, DType compute) {
  constexpr const char* names[] = {"", "f32 or bf16", "f32", "bf16", "i32", "u8", "f64"};
  return rule == DTypeRule::compute ? limbeck::name_of(compute) : names[static_cast<size_t>(rule)];
}
DType output_dtype(DTypeRule rule, DType compute) {
  constexpr DType types[] = {DType::f32, DType::f32, DType::f32, DType::bf16, DType::i32, DType::u8, DType::f64};
  return rule == DTypeRule::compute ? compute : types[static_cast<size_t>(rule)];
}

// What a call computes in: see the head of signature.h.
DType compute_dtype(const Signature& sig, const Call& call) {
  const auto is_float = [](DType t) { return t == DType::f32 || t == DType::bf16; };
  for (const DTypeRule rule : {DTypeRule::compute, DTypeRule::any_float})
    for (size_t i = 0; i < sig.in.size(); ++i)
      if (sig.in[i].dtype == rule && call.in[i] && is_float(call.in[i].dtype)) return call.in[i].dtype;
  return DType::f32;
}

// What the dims of one call stand for.
struct Binding {
  static constexpr int64_t unbound = -1;
  int64_t symbol[kMaxSymbols];
  const char* from[kMaxSymbols];  // the tensor that bound it, for the error text
  int64_t star[kMaxRank];
  int star_rank = -1;
};

[[noreturn]] void refuse_shape(const Signature& sig, const TensorSpec& spec, const View& v, const Binding& b) {
  std::string wanted = "[";
  std::string why;
  for (const Dim& d : spec.dims) {
    if (wanted.size() > 1) wanted += " ";
    if (d.kind == Dim::star) {
      if (b.star_rank < 0) { wanted += "*"; continue; }
      for (int i = 0; i < b.star_rank; ++i) {
        if (i) wanted += ' ';
        wanted += std::to_string(b.star[i]);
      }
    } else if (d.kind == Dim::fixed) {
      wanted += std::to_string(d.value);
    } else {
      const std::string& name = sig.symbols[d.value];
      const bool known = b.symbol[d.value] != Binding::unbound;
      wanted += known ? std::to_string(b.symbol[d.value]) : name;
      if (known && b.from[d.value] != spec.name) why += (why.empty() ? " (" : ", ") + name + " = " + std::to_string(b.symbol[d.value]) + " from " + b.from[d.value];
    }
  }
  wanted += "]";
  if (!why.empty()) why += ")";
  throw Error(ErrorKind::shape, "ERR_SHAPE",
              sig.op + ": " + spec.name + " has shape " + shape_text(v) + ", expected " + wanted + why + "; the op is " + sig.text)
      .in(sig.op).on(spec.name).wanted(wanted).got(shape_text(v));
}

void bind_input(const Signature& sig, const TensorSpec& spec, const View& v, DType compute, Binding& b) {
  if (!fits(spec.dtype, v.dtype, compute))
    throw Error(ErrorKind::dtype, "ERR_DTYPE",
                sig.op + ": " + spec.name + " is " + limbeck::name_of(v.dtype) + ", expected " + name_of(spec.dtype, compute) + "; convert it with cast()")
        .in(sig.op).on(spec.name).wanted(name_of(spec.dtype, compute)).got(limbeck::name_of(v.dtype));
  const bool star = !spec.dims.empty() && spec.dims[0].kind == Dim::star;
  const int named = static_cast<int>(spec.dims.size()) - (star ? 1 : 0);
  const int lead = v.rank - named;
  if (lead < 0 || (!star && lead != 0)) refuse_shape(sig, spec, v, b);
  if (star) {
    if (b.star_rank < 0) {
      b.star_rank = lead;
      std::copy(v.dims, v.dims + lead, b.star);
    } else if (b.star_rank != lead || !std::equal(v.dims, v.dims + lead, b.star)) {
      refuse_shape(sig, spec, v, b);
    }
  }
  for (int i = 0; i < named; ++i) {
    const Dim& d = spec.dims[i + (star ? 1 : 0)];
    const int64_t size = v.dims[lead + i];
    if (d.kind == Dim::fixed) {
      if (size != d.value) refuse_shape(sig, spec, v, b);
    } else if (b.symbol[d.value] == Binding::unbound) {
      b.symbol[d.value] = size;
      b.from[d.value] = spec.name.c_str();
    } else if (b.symbol[d.value] != size) {
      refuse_shape(sig, spec, v, b);
    }
  }
}

}  // namespace

Signature Signature::parse(std::string_view text) { return Parser(text).run(); }

void Signature::bind(Call& call, bool computes_bf16) const {
  const DType compute = computes_bf16 ? compute_dtype(*this, call) : DType::f32;
  Binding b;
  std::fill(b.symbol, b.symbol + symbols.size(), Binding::unbound);
  for (size_t i = 0; i < in.size(); ++i) {
    if (call.in[i]) {
      bind_input(*this, in[i], call.in[i], compute, b);
    } else if (!in[i].optional) {
      throw Error(ErrorKind::shape, "ERR_MISSING_ARGUMENT", op + ": " + in[i].name + " is missing; the op is " + this->text)
          .in(op).on(in[i].name).wanted("a tensor").got("nothing");
    }
  }
  for (size_t i = 0; i < out.size(); ++i) {
    View& v = call.out[i];
    const TensorSpec& spec = out[i];
    v.dtype = output_dtype(spec.dtype, compute);
    v.rank = 0;
    const auto add = [&](int64_t size) {
      if (v.rank == kMaxRank)
        throw Error(ErrorKind::shape, "ERR_RANK", op + ": output " + spec.name + " would have more than " + std::to_string(kMaxRank) + " dims; the op is " + this->text)
            .in(op).on(spec.name);
      v.dims[v.rank++] = size;
    };
    for (const Dim& d : spec.dims) {
      if (d.kind == Dim::star) {
        for (int k = 0; k < b.star_rank; ++k) add(b.star[k]);
      } else if (d.kind == Dim::fixed) {
        add(d.value);
      } else {
        int64_t size = b.symbol[d.value];
        if (size == Binding::unbound) {
          const auto it = std::find(scalars.begin(), scalars.end(), symbols[d.value]);
          const double given = it == scalars.end() ? -1 : call.scalar[it - scalars.begin()];
          size = static_cast<int64_t>(given);
          if (size < 0 || static_cast<double>(size) != given)
            throw Error(ErrorKind::shape, "ERR_SHAPE", op + ": nothing says how large " + symbols[d.value] + " of output " + spec.name + " is; the op is " + this->text)
                .in(op).on(spec.name);
        }
        add(size);
      }
    }
  }
}

}  // namespace limbeck
