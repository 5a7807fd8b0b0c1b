// Package thread owns operating system threads that are not like the others: in namespaces, roots or cgroups of their own.
package thread

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Go runs f on an operating system thread of its own, which ends with f: f may change the thread's namespaces, root,
// cgroup and whatever else belongs to a thread. It never takes the process's main thread, since /proc/self shows that one.
func Go(f func()) {
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread dies when this goroutine returns
		if unix.Gettid() == os.Getpid() {
			// The scheduler gave us the main thread. Holding it here makes the next one another; then let it go unchanged.
			done := make(chan struct{})
			go func() {
				defer close(done)
				Go(f)
			}()
			<-done
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
}
