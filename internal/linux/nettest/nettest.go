// Package nettest runs a package's tests in a network namespace of their own, so that the machine's interfaces, ports and tables are not
// touched. Tests alone import it.
package nettest

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// marker is in the environment of the execution that has the namespace.
const marker = "CONEX_TEST_NETNS"

// Main is a package's TestMain. prepare, which may be nil, sets the new namespace up. Who may not make one skips the tests, which is said
// with why.
func Main(m *testing.M, why string, prepare func() error) {
	if os.Getuid() != 0 {
		fmt.Println("skip:", why)
		return
	}
	if os.Getenv(marker) == "" {
		err := execute()
		fmt.Println("run tests in a network namespace:", err)
		os.Exit(1)
	}
	if prepare != nil {
		if err := prepare(); err != nil {
			fmt.Println("set up the test's namespace:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// LoopbackUp brings lo up in the caller's network namespace.
func LoopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// execute becomes the same program in a new namespace: all threads of an execution are where the one was that asked for it.
func execute() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), marker+"=1"))
}
