// A range of this process's own addresses.
#pragma once
#include <memory>

#include "core/backend.h"

namespace limbeck {

// Pages are the system's until they are touched, so the reservation itself costs nothing.
std::unique_ptr<Range> reserve_pages(size_t bytes);

}  // namespace limbeck
