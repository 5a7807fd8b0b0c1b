package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"conex/internal/engine"
	"conex/internal/linux/tty"
)

// terminal returns the file behind w if that is a terminal.
func terminal(w any) (*os.File, bool) {
	f, ok := w.(*os.File)
	return f, ok && f != nil && tty.IsTerminal(int(f.Fd()))
}

// errNotTTY is what -t with standard input, but without a terminal there, ends with.
var errNotTTY = errors.New("the input device is not a TTY")

// checkTTY refuses to attach a pseudo-terminal to a standard input that is none: keys could not be passed on one by one.
func (a *app) checkTTY(stdin, wantTTY bool) error {
	if stdin && wantTTY {
		if _, ok := terminal(a.in); !ok {
			return errNotTTY
		}
	}
	return nil
}

// session is the user's side of an attached container or exec: raw mode, sizes and signals, until close.
type session struct {
	streams engine.Streams
	// term is the terminal whose size is followed, keyboard the one in raw mode; nil for none.
	term, keyboard *os.File
	sizes          chan engine.Size

	undo  []func()
	ended func() // stops endBySignal's goroutine
	once  sync.Once
}

// sessionOptions says what to attach.
type sessionOptions struct {
	stdin, tty bool
	// signals asks for signals to be passed on; else they end the program as usual (after close, see endBySignal).
	signals    bool
	detachKeys string
	// later leaves the terminal as it is until begin is called: until then Ctrl-C must work, and lines end as usual.
	later bool
	// redraw makes the program in the container paint its screen anew, for a terminal that comes to it late.
	redraw bool
}

// checkKeys refuses --detach-keys that are none.
func checkKeys(keys string) error {
	if _, err := tty.ParseDetachKeys(keys); err != nil {
		return fmt.Errorf("invalid detach keys (%s): %w", keys, err)
	}
	return nil
}

// attach prepares the user's terminal. The caller must close the session, whatever happens: close gives the terminal its mode back.
func (a *app) attach(o sessionOptions) (*session, error) {
	s := &session{streams: engine.Streams{Stdout: a.out, DetachKeys: o.detachKeys}}
	if s.streams.DetachKeys == "" {
		s.streams.DetachKeys = tty.DefaultDetachKeys
	}
	if err := checkKeys(o.detachKeys); err != nil {
		return nil, err
	}
	if !o.tty {
		s.streams.Stderr = a.err // with a terminal there is one stream only
	}
	if o.stdin {
		s.streams.Stdin = io.Reader(a.in)
	}
	if o.tty {
		s.term = a.controlling()
		s.sizes = make(chan engine.Size, 2)
		if s.term != nil {
			s.streams.Resize = s.sizes
			s.firstSize(o.redraw)
		}
		if f, ok := terminal(a.in); ok && o.stdin {
			s.keyboard = f
		}
	}
	if !o.later {
		if err := s.begin(); err != nil {
			return nil, err
		}
	}
	if o.signals {
		ch := make(chan os.Signal, 16)
		signal.Notify(ch, forwarded()...)
		s.streams.Signals = ch
		s.undo = append(s.undo, func() { signal.Stop(ch) })
	} else if o.tty && !o.later {
		s.endBySignal()
	}
	return s, nil
}

// controlling returns the terminal whose size counts, nil if there is none.
func (a *app) controlling() *os.File {
	if f, ok := terminal(a.out); ok {
		return f
	}
	if f, ok := terminal(a.in); ok {
		return f
	}
	return nil
}

// firstSize reports the size before anything starts. With redraw another one comes before it, since programs repaint on a change.
func (s *session) firstSize(redraw bool) {
	sz, err := tty.GetSize(int(s.term.Fd()))
	if err != nil {
		return // without a size the container's terminal has none either
	}
	if redraw {
		s.sizes <- engine.Size{Rows: sz.Rows + 1, Cols: sz.Cols + 1}
	}
	s.sizes <- engine.Size{Rows: sz.Rows, Cols: sz.Cols}
}

// begin switches the terminal to raw mode and follows its size.
func (s *session) begin() error {
	if s.keyboard != nil {
		fd := int(s.keyboard.Fd())
		old, err := tty.MakeRaw(fd)
		if err != nil {
			return err
		}
		s.undo = append(s.undo, func() { tty.Restore(fd, old) }) //nolint:errcheck // the terminal may be gone; nobody is left to tell
	}
	if s.term == nil {
		return nil
	}
	winch := make(chan os.Signal, 1)
	signal.Notify(winch, syscall.SIGWINCH)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() { // ends with close
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-winch:
			}
			sz, err := tty.GetSize(int(s.term.Fd()))
			if err != nil {
				continue // the terminal is gone, the reads will end
			}
			select {
			case s.sizes <- engine.Size{Rows: sz.Rows, Cols: sz.Cols}:
			case <-stop:
				return
			}
		}
	}()
	s.undo = append(s.undo, func() {
		signal.Stop(winch)
		close(stop)
		<-done
	})
	return nil
}

// endBySignal makes signals that end the program give the terminal back first.
func (s *session) endBySignal() {
	ch := make(chan os.Signal, 1)
	stop := make(chan struct{})
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	go func() {
		select {
		case sig := <-ch:
			s.close()
			os.Exit(128 + int(sig.(syscall.Signal)))
		case <-stop:
		}
	}()
	s.ended = func() {
		signal.Stop(ch)
		close(stop)
	}
}

// close ends the session: idempotent.
func (s *session) close() {
	s.once.Do(func() {
		for i := len(s.undo) - 1; i >= 0; i-- {
			s.undo[i]()
		}
		if s.ended != nil {
			s.ended()
		}
	})
}

// forwarded are the signals that are passed on to a container: all that a user or a supervisor sends on purpose.
func forwarded() []os.Signal {
	var all []os.Signal
	for n := 1; n <= 31; n++ {
		switch s := syscall.Signal(n); s {
		case syscall.SIGKILL, syscall.SIGSTOP: // can't be caught
		case syscall.SIGCHLD, syscall.SIGPIPE, syscall.SIGURG, syscall.SIGWINCH: // ours: children, broken pipes, Go's scheduler, sizes
		case syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGTRAP: // faults of this program
		case syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU: // job control of this program
		default:
			all = append(all, s)
		}
	}
	return all
}
