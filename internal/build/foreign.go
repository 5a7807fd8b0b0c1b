package build

import "conex/internal/runtime"

// foreign explains why a command of another platform can't be executed.
func (x *execution) foreign(err *runtime.ExecError) error { return err }
