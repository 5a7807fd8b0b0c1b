package tty

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Ready waits until in can be read, or has ended. It is false when stop can be read or is closed at its other end before that.
func Ready(in, stop *os.File) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(in.Fd()), Events: unix.POLLIN}, {Fd: int32(stop.Fd()), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return false, err
		case fds[1].Revents != 0:
			return false, nil
		case fds[0].Revents != 0:
			return true, nil
		}
	}
}

// CopyUntil copies what is typed at in to w, until in ends or Ready says no. What is typed afterwards is left to the next reader.
func CopyUntil(w io.Writer, in, stop *os.File) error {
	buf := make([]byte, 4096)
	for {
		ok, err := Ready(in, stop)
		if err != nil || !ok {
			return err
		}
		n, err := unix.Read(int(in.Fd()), buf)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil || n == 0 {
			return err
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
	}
}
