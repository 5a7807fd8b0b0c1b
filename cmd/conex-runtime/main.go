// Command conex-runtime is conex's OCI runtime command line alone, as containerd, Docker and Podman call it for every container: a third
// of conex's size and of its start-up. A link of that name to conex does the same.
//
// A few milliseconds need not know how much processor time the caller's cgroup allows, which takes reading half a dozen files.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0
package main

import (
	"os"
	"runtime"

	"conex/internal/linux/thread"
	"conex/internal/ocicli"
)

// The main goroutine stays on the main thread, which a container's thread must not be.
func init() { runtime.LockOSThread() }

func main() {
	thread.Room()
	os.Exit(ocicli.Main(os.Args[1:]))
}
