// Package tty owns terminals: raw mode, window sizes, the pseudo-terminal of a container, and the keys that detach from one.
package tty

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// State is a terminal's mode, to be restored later.
type State struct{ termios unix.Termios }

// IsTerminal reports whether fd is a terminal.
func IsTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// MakeRaw switches a terminal to raw mode (every key goes through at once, without echo and without making signals) and returns
// the mode that it had.
func MakeRaw(fd int) (*State, error) {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("terminal mode: %w", err)
	}
	old := &State{*t}
	// What cfmakeraw(3) does. Output must go through as it is, too: a full-screen program in the container has switched the
	// translation of line ends off on its own terminal and counts on that.
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag &^= unix.CSIZE | unix.PARENB
	t.Cflag |= unix.CS8
	t.Cc[unix.VMIN] = 1
	t.Cc[unix.VTIME] = 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("make terminal raw: %w", err)
	}
	return old, nil
}

// HideInput keeps a terminal from showing what is typed and returns the mode that it had.
func HideInput(fd int) (*State, error) {
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("terminal mode: %w", err)
	}
	old := &State{*t}
	t.Lflag &^= unix.ECHO
	t.Lflag |= unix.ICANON | unix.ISIG
	t.Iflag |= unix.ICRNL
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("hide input: %w", err)
	}
	return old, nil
}

// Restore gives a terminal the mode back that MakeRaw or HideInput has found.
func Restore(fd int, s *State) error {
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &s.termios); err != nil {
		return fmt.Errorf("restore terminal mode: %w", err)
	}
	return nil
}

// Size is a terminal's size in characters.
type Size struct{ Rows, Cols uint16 }

// GetSize asks for a terminal's size.
func GetSize(fd int) (Size, error) {
	ws, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ)
	if err != nil {
		return Size{}, fmt.Errorf("terminal size: %w", err)
	}
	return Size{ws.Row, ws.Col}, nil
}

// SetSize changes a terminal's size. The kernel sends SIGWINCH to its foreground processes if the size differs.
func SetSize(fd int, s Size) error {
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols}); err != nil {
		return fmt.Errorf("set terminal size: %w", err)
	}
	return nil
}

// OpenPTY makes a new terminal in the devpts that ptmx belongs to, ptmx being a freshly opened "ptmx" of it, which so becomes the
// terminal's master: the caller keeps ptmx and writes and reads the terminal there. It returns the slave, to be the container's
// stdio, and the slave's path inside that devpts ("/dev/pts/0"), for information: the slave was opened through the master
// (TIOCGPTPEER), never by a path, since what lies at a path in the container is the container's to choose (CVE-2016-9962's
// family).
func OpenPTY(ptmx *os.File) (slave *os.File, slavePath string, err error) {
	// Not Fd(): that would make the master blocking, and then closing it could not end a read.
	rc, err := ptmx.SyscallConn()
	if err != nil {
		return nil, "", fmt.Errorf("open pseudo-terminal: %w", err)
	}
	cerr := rc.Control(func(fd uintptr) { slave, slavePath, err = openSlave(int(fd)) })
	if err == nil {
		err = cerr
	}
	return slave, slavePath, err
}

func openSlave(fd int) (*os.File, string, error) {
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, "", fmt.Errorf("unlock pseudo-terminal: %w", err)
	}
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, "", fmt.Errorf("number of pseudo-terminal: %w", err)
	}
	path := "/dev/pts/" + strconv.FormatUint(uint64(n), 10)
	slave, err := peer(fd)
	if err != nil {
		return nil, "", fmt.Errorf("open slave of pseudo-terminal: %w", err)
	}
	return os.NewFile(uintptr(slave), path), path, nil
}

// peer opens the slave without making it our controlling terminal. TIOCGPTPEER takes its flags by value.
func peer(fd int) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR:
		default:
			return -1, errno
		}
	}
}
