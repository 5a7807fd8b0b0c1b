package engine

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// each calls fn for 0 to n-1, on all processors if that is worth it.
func each(n int, fn func(i int)) {
	workers := min(runtime.GOMAXPROCS(0), n/eachShare)
	if workers < 2 {
		for i := range n {
			fn(i)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				fn(int(i))
			}
		})
	}
	wg.Wait()
}

// eachShare is how many containers a processor of its own is worth: each takes some 50 µs.
const eachShare = 16
