// The header of the toolkit with this name, by the stand-in.
#include "../stand_in.h"
