package monitor

import (
	"os"
	"unsafe"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/linux/cgroup"
	"conex/internal/plainjson"
	"conex/internal/runtime"
)

// warmUp does while the container is being made what would otherwise be done when it is there: whatever depends on the machine alone.
func warmUp() {
	// What the package plainjson works out once for each type. Nothing can fail: there is nothing in them.
	for _, v := range []any{container.State{Exit: &container.Exit{}}, container.Desired{}, control.Report{}} {
		_, _ = plainjson.Marshal(v)
	}
	cgroup.Probe()
	runtime.DefaultSpec()
}

// rename writes the container's id into our command line, where ps shows it. The engine left room for it (control.Placeholder): the
// monitor is executed before its container has an id.
func rename(id string) {
	if len(os.Args) != 2 || len(os.Args[1]) != len(control.Placeholder) || len(id) < len(control.Placeholder) {
		return
	}
	// The runtime's strings of the arguments are the kernel's own memory of them, which is ours to write.
	copy(unsafe.Slice(unsafe.StringData(os.Args[1]), len(control.Placeholder)), id)
}
