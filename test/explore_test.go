package test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// TestExplore looks at an image on a terminal, as a person would: moves, searches, resizes, quits, and has the terminal back.
func TestExplore(t *testing.T) {
	w := newWorld(t)
	w.write("img/Dockerfile", "FROM busybox\nRUN mkdir /d && head -c 300000 /dev/zero >/d/big\nRUN rm /d/big; echo x > \"/d/$(printf 'a\\033[31mred\\nnl')\"\n")
	w.conex("build", "-q", "-t", "waste", filepath.Join(w.dir, "img"))
	// A terminal as new: that of the command may be another already when the test comes to look.
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	defer slave.Close()
	before := termios(t, master)
	for _, end := range []string{"q", "\x03"} {
		term := w.terminal("image", "explore", "waste")
		term.expect(`waste:latest.*efficiency \d\d\.\d%.*300kB wasted`)
		term.expect(`A .*a\\x1b\[31mred\\nnl`) // never raw
		if after := termios(t, term.tty); after == before {
			t.Error("the terminal is not in raw mode")
		}
		term.send("[") // the layer before
		term.expect(`300kB`)
		term.send("/busyb\r")
		term.expect(`busyb: 1 of \d`)
		if err := pty.Setsize(term.tty, &pty.Winsize{Rows: 40, Cols: 132}); err != nil {
			t.Fatal(err)
		}
		term.expect(`q:quit|busyb`)
		term.send("?")
		term.expect(`any key goes back`)
		term.send("x")
		term.send("w")
		term.expect(`Wasted +300kB in 1 file`)
		term.send(end)
		term.expect(`\x1b\[\?1049l`) // the screen from before
		w.eventually("the terminal is as it was", func() bool { return termios(t, term.tty) == before })
		if code := term.wait(); code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
	term := w.terminal("image", "explore", "nothing")
	term.expect(`conex: No such image: nothing:latest\r\n`)
	if code := term.wait(); code != 1 {
		t.Errorf("exit code %d for an image that is not there", code)
	}
}

func termios(t *testing.T, tty *os.File) unix.Termios {
	t.Helper()
	got, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *got
}
