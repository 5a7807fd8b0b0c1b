package thread

import (
	"os"
	"runtime"
	"runtime/metrics"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOneProcessor: with one processor every goroutine may find itself on the main thread. One that does hands over to a single other.
func TestOneProcessor(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const calls, others = 100, 50 // others are the testing package's
	before := created()
	for range calls {
		tid := make(chan int)
		Go(func() { tid <- unix.Gettid() })
		if <-tid == os.Getpid() {
			t.Fatal("the function runs on the main thread")
		}
	}
	if n := created() - before; n > 2*calls+others {
		t.Fatalf("%d goroutines for %d calls", n, calls)
	}
}

// created counts the goroutines that were ever made.
func created() uint64 {
	s := []metrics.Sample{{Name: "/sched/goroutines-created:goroutines"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
