package monitor

import (
	"context"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"

	"golang.org/x/sys/unix"
)

// peerKey finds a request's connection in its context.
type peerKey struct{}

// withConn keeps the connection for who wants to know its other end.
func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, c)
}

// ender says who asks for the end of the run, by what the kernel knows of the connection's other end.
func ender(q *http.Request, command string, sig unix.Signal) *container.Ender {
	e := &container.Ender{Command: command, Signal: int(sig), Time: time.Now().UTC()}
	conn, ok := q.Context().Value(peerKey{}).(*net.UnixConn)
	if !ok {
		return e
	}
	rc, err := conn.SyscallConn()
	if err != nil {
		return e
	}
	var cred *unix.Ucred
	if err := rc.Control(func(fd uintptr) { cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || cred == nil {
		return e // the run ends all the same
	}
	e.UID, e.Pid = int(cred.Uid), int(cred.Pid)
	if cred.Pid > 0 {
		e.Process = comm(e.Pid)
		if st, ok := readStat(e.Pid); ok && st.parent > 0 {
			e.Parent = comm(st.parent)
		}
	}
	return e
}

// comm is a process's name, "" when it is gone. Anybody may choose his own, so it is made printable.
func comm(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil {
		return ""
	}
	return container.Printable(strings.TrimSuffix(string(b), "\n"))
}
