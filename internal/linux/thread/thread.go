// Package thread owns operating system threads that are not like the others: in namespaces, roots or cgroups of their own.
package thread

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Go runs f on an operating system thread of its own, which ends with f: f may change the thread's namespaces, root,
// cgroup and whatever else belongs to a thread. It never takes the process's main thread, since /proc/self shows that one.
func Go(f func()) { go run(f, nil) }

// run is Go's goroutine; it closes locked, if there is one, once it has a thread that is not the main one.
func run(f func(), locked chan<- struct{}) {
	runtime.LockOSThread() // never unlocked, so the thread dies when this goroutine returns
	if unix.Gettid() == os.Getpid() {
		// The scheduler gave us the main thread. Who holds it and waits leaves another one to the next goroutine. It waits until that one
		// has its thread: on a single processor it would otherwise be back on the main thread before the next goroutine ever ran, and so on.
		other := make(chan struct{})
		go run(f, other)
		<-other
		runtime.UnlockOSThread()
		return
	}
	if locked != nil {
		close(locked)
	}
	Room()
	f()
}

// Room gives the calling goroutine a stack of 32 KB at once. By doubling it would be copied four times on the way there, each time with all
// that calls it to be looked up: of the few milliseconds that a container takes, that is a fiftieth. It touches none of the memory.
func Room()
