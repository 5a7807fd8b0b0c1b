package engine

import (
	"context"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// endable returns a reader of r, a program's standard input, that ends with ctx even while nobody writes: a read that waits for a
// pipe or a terminal could not be told to stop otherwise.
func endable(ctx context.Context, r io.Reader) io.Reader {
	f, ok := r.(*os.File)
	if !ok {
		return r
	}
	if st, err := f.Stat(); err != nil || st.Mode().IsRegular() {
		return r // never waits for anybody
	}
	return &endableFile{ctx, f}
}

type endableFile struct {
	ctx context.Context //nolint:containedctx // a reader of one operation
	f   *os.File
}

// pollEvery is how long a wait lasts before it looks at its context, in milliseconds.
const pollEvery = 200

func (e *endableFile) Read(p []byte) (int, error) {
	fds := []unix.PollFd{{Fd: int32(e.f.Fd()), Events: unix.POLLIN}}
	for {
		if err := e.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := unix.Poll(fds, pollEvery)
		if err != nil && err != unix.EINTR {
			return 0, os.NewSyscallError("poll", err)
		}
		if n > 0 {
			return e.f.Read(p)
		}
	}
}
