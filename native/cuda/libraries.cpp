#include "cuda/libraries.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <mutex>

#include "core/error.h"
#include "cuda/runtime.h"

namespace limbeck::cuda {
namespace fs = std::filesystem;
namespace {

#ifdef CUDART_VERSION
constexpr int kOwnMajor = CUDART_VERSION / 1000;
#else
constexpr int kOwnMajor = 13;
#endif

struct Facts {
  const char *name, *variable, *file, *wheel, *fix;
  std::vector<int> majors;  // of the file's version, best first
};

const Facts& facts(Vendor vendor) {
  // Of two releases the one that the kernels were built with comes first: it runs on the drivers that they run on.
  static const Facts cublaslt = {"cuBLASLt", "LIMBECK_CUBLASLT_PATH", "libcublasLt.so", "cublas",
                                 "install the CUDA toolkit, or: pip install nvidia-cublas",
                                 kOwnMajor == 12 ? std::vector<int>{12, 13} : std::vector<int>{13, 12}};
  static const Facts nccl = {"NCCL", "LIMBECK_NCCL_PATH", "libnccl.so", "nccl",
                             kOwnMajor == 12 ? "install the package libnccl2, or: pip install nvidia-nccl-cu12"
                                             : "install the package libnccl2, or: pip install nvidia-nccl-cu13",
                             {2}};
  return vendor == Vendor::cublaslt ? cublaslt : nccl;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// Folders of `parent` whose name begins with `prefix`, the newest version first.
std::vector<std::string> versions(const std::string& parent, const std::string& prefix) {
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator it(parent, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name.rfind(prefix, 0) == 0) found.push_back(it->path().string());
  }
  // By length first, so that 3.9 comes after 3.11.
  std::sort(found.begin(), found.end(),
            [](const std::string& a, const std::string& b) { return a.size() != b.size() ? a.size() > b.size() : a > b; });
  return found;
}

std::string own_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&own_folder), &info) || !info.dli_fname) return "";
  std::error_code error;
  const fs::path path = fs::absolute(info.dli_fname, error);
  return error ? "" : path.parent_path().string();
}

std::vector<std::string> toolkits() {
  std::vector<std::string> homes = {environment("CUDA_HOME"), environment("CUDA_PATH")}, folders;
  for (const std::string& home : versions("/usr/local", "cuda")) homes.push_back(home);
  for (const std::string& home : homes)
    if (!home.empty())
      for (const char* lib : {"/lib64", "/lib", "/targets/x86_64-linux/lib", "/targets/sbsa-linux/lib"}) folders.push_back(home + lib);
  return folders;
}

// Folders of Python packages: those of the active environment, the user's own, those of each python3 on PATH.
std::vector<std::string> site_packages() {
  std::vector<std::string> prefixes = {environment("VIRTUAL_ENV"), environment("CONDA_PREFIX")}, folders;
  if (const std::string home = environment("HOME"); !home.empty()) prefixes.push_back(home + "/.local");
  const std::string path = environment("PATH");
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find(':', begin), path.size());
    std::error_code error;
    const fs::path python = fs::path(path.substr(begin, end - begin)) / "python3";
    if (end > begin && fs::exists(python, error)) prefixes.push_back(python.parent_path().parent_path().string());
    begin = end + 1;
  }
  prefixes.push_back("/usr/local");  // where Debian's pip installs for everybody
  for (const std::string& prefix : prefixes) {
    if (prefix.empty()) continue;
    for (const std::string& python : versions(prefix + "/lib", "python3"))
      for (const char* kind : {"/site-packages", "/dist-packages"}) folders.push_back(python + kind);
  }
  return folders;
}

std::vector<std::string> folders_of(const Facts& facts) {
  std::vector<std::string> folders = {own_folder()};
  for (std::string& folder : toolkits()) folders.push_back(std::move(folder));
  for (const std::string& packages : site_packages()) {
    std::error_code error;
    const std::string nvidia = packages + "/nvidia";
    if (!fs::is_directory(nvidia, error)) folders.push_back(nvidia);
    else
      for (const char* wheel : {facts.wheel, "cu13", "cu12"}) folders.push_back(nvidia + "/" + wheel + "/lib");
  }
  if (const std::string conda = environment("CONDA_PREFIX"); !conda.empty()) folders.push_back(conda + "/lib");

  // A folder that links lead to twice is looked at once.
  std::vector<std::string> unique;
  std::vector<fs::path> seen;
  for (const std::string& folder : folders) {
    std::error_code error;
    const fs::path real = fs::weakly_canonical(folder, error);
    if (folder.empty() || std::find(seen.begin(), seen.end(), real) != seen.end()) continue;
    seen.push_back(real);
    unique.push_back(folder);
  }
  return unique;
}

std::vector<std::string> file_names(const Facts& facts) {
  std::vector<std::string> names;
  for (int major : facts.majors) names.push_back(std::string(facts.file) + "." + std::to_string(major));
  names.push_back(facts.file);
  return names;
}

bool try_open(Library& library, const std::string& path) {
  library.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library.handle) {
    const char* said = dlerror();
    std::string problem = said ? said : "cannot be opened";
    if (problem.rfind(path + ": ", 0) == 0) problem.erase(0, path.size() + 2);
    library.places.push_back({path, problem});
    return false;
  }
  library.path = path;
  return true;
}

bool try_folder(Library& library, const Facts& facts, const std::string& folder) {
  bool any = false;
  std::error_code error;
  for (const std::string& name : file_names(facts)) {
    const std::string path = folder + "/" + name;
    if (!fs::exists(path, error)) continue;
    any = true;
    if (try_open(library, path)) return true;
  }
  if (!any) library.places.push_back({folder, fs::is_directory(folder, error) ? "not in this folder" : "no such folder"});
  return false;
}

Library look_for(const Facts& facts) {
  Library library;
  if (const std::string given = environment(facts.variable); !given.empty()) {
    std::error_code error;
    if (fs::is_directory(given, error)) try_folder(library, facts, given);
    else try_open(library, given);
    return library;
  }
  for (const std::string& folder : folders_of(facts))
    if (try_folder(library, facts, folder)) return library;
  for (const std::string& name : file_names(facts))
    if (try_open(library, name)) break;
  // By name the loader says only which name it lacks; where it looked is in the loaded file.
  if (library.handle) {
    Dl_info info;
    void* any = dlsym(library.handle, facts.file[3] == 'n' ? "ncclGetVersion" : "cublasLtGetVersion");
    if (any && dladdr(any, &info) && info.dli_fname) library.path = info.dli_fname;
  }
  return library;
}

std::string version_of(Vendor vendor) {
  const Library& found = library(vendor);
  if (!found.handle) return "";
  size_t major = 0, minor = 0, patch = 0;
  if (vendor == Vendor::cublaslt) {
    size_t (*version)() = nullptr;
    found.symbol("cublasLtGetVersion", version);
    const size_t v = version ? version() : 0;  // 130002 is 13.0.2, 120803 is 12.8.3
    major = v / 10000, minor = v / 100 % 100, patch = v % 100;
  } else {
    int (*version)(int*) = nullptr;
    found.symbol("ncclGetVersion", version);
    int v = 0;
    if (version) version(&v);  // 22703 is 2.27.3
    major = v / 10000, minor = v / 100 % 100, patch = v % 100;
  }
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

}  // namespace

void* Library::symbol(const char* name) const { return handle ? dlsym(handle, name) : nullptr; }

const Library& library(Vendor vendor) {
  static std::once_flag looked[2];
  static Library found[2];
  const int i = static_cast<int>(vendor);
  std::call_once(looked[i], [&] { found[i] = look_for(facts(vendor)); });
  return found[i];
}

const Library& require(Vendor vendor) {
  const Library& found = library(vendor);
  if (found.handle) return found;
  const Facts& f = facts(vendor);
  std::string message = std::string(f.name) + " was not found. Looked for " + f.file + ":";
  for (const Place& place : found.places) message += "\n  " + place.path + "\n    " + place.problem;
  message += std::string("\nTo fix it:\n  ") + f.fix + "\n  or set " + f.variable + " to the file or its folder";
  throw Error(ErrorKind::device, "ERR_LIBRARY_MISSING", message).on(f.name).wanted(f.file);
}

std::string quoted(const std::string& text) {
  std::string json = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') (json += '\\') += c;
    else json += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return json + '"';
}

std::string libraries_json() {
  std::string json = "[";
  for (const Vendor vendor : {Vendor::cublaslt, Vendor::nccl}) {
    const Library& found = library(vendor);
    if (json.size() > 1) json += ", ";
    json += std::string("{\"name\": \"") + facts(vendor).name + "\", \"path\": " + quoted(found.path) + ", \"version\": " + quoted(version_of(vendor)) +
            ", \"lookedIn\": [";
    for (size_t i = 0; i < found.places.size(); ++i) json += (i ? ", " : "") + quoted(found.places[i].path + ": " + found.places[i].problem);
    json += "]}";
  }
  return json + "]";
}

}  // namespace limbeck::cuda
