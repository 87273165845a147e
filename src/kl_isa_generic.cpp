// The rows for what the compiler targets by default (kl_isa.h).
#include "kl_isa.h"

kl::Isa kl::generic_isa() { return KL_ISA(generic, true); }
