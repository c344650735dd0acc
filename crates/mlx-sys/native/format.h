// mlx-c formats its error texts with C++20's std::format, which gcc has from version 13 on. This header is included
// ahead of mlx-c's sources and supplies the part that they use, replacing each "{}" in turn, where <format> is missing.
#pragma once

#include <version>

#if !defined(__cpp_lib_format)
#include <sstream>
#include <string>
#include <string_view>

namespace std {

inline void mlx_engine_format(ostringstream& out, string_view text) {
  out << text;
}

template <class First, class... Rest>
void mlx_engine_format(ostringstream& out, string_view text, const First& first, const Rest&... rest) {
  auto hole = text.find("{}");
  out << text.substr(0, hole);
  if (hole != string_view::npos) {
    out << first;
    mlx_engine_format(out, text.substr(hole + 2), rest...);
  }
}

template <class... Args>
string format(string_view text, const Args&... args) {
  ostringstream out;
  mlx_engine_format(out, text, args...);
  return out.str();
}

} // namespace std
#else
#include <format>
#endif
