#pragma once

namespace foreshock {

// What a kernel returns: nullptr when it is done, otherwise a static sentence that says why not.
using Status = const char*;

}  // namespace foreshock
