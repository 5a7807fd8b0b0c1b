// Package sigforward hands signals on to another process.
//
// Go's runtime hands a signal to a goroutine by way of a thread of its own, and to ask it for one costs two switches of threads. A program
// that only passes them on needs neither: here the handler itself sends the signal (pidfd_send_signal(2)) and returns.
package sigforward

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"
)

// target is the descriptor that the handler sends to, 0 before there is one.
var target int32

// action is struct sigaction of the kernel's.
type action struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

const (
	onStack, restart, restorer = 0x08000000, 0x10000000, 0x04000000 // SA_*
	setSize                    = 8
)

// To has signals sent to the process behind pidfd, for the rest of this program's life. The descriptor stays open, so that its number means
// no other process. To is called once, and os/signal is not asked for any of the signals. errors.ErrUnsupported says that this
// architecture has no handler.
func To(pidfd int, signals ...syscall.Signal) error {
	handler, back := addresses()
	if handler == 0 {
		return fmt.Errorf("forward signals: %w", errors.ErrUnsupported)
	}
	if target != 0 {
		return errors.New("forward signals: they go to another process already")
	}
	target = int32(pidfd)
	a := action{handler: handler, flags: onStack | restart, mask: ^uint64(0)}
	if back != 0 {
		a.flags |= restorer
		a.restorer = back
	}
	for _, s := range signals {
		if _, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&a)), 0, setSize, 0, 0); errno != 0 {
			return fmt.Errorf("forward signal %d: %w", s, errno)
		}
	}
	return nil
}
