package monitor

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/control"
	"conex/internal/linux/tty"
	"conex/internal/plainjson"

	"golang.org/x/sys/unix"
)

// server answers on the container's socket.
type server struct {
	m    *monitor
	http *http.Server
	done chan struct{}
}

// answerTimeout is how long the end waits for answers that are being written.
const answerTimeout = 2 * time.Second

// listen opens the socket, in the place of one that a dead monitor left.
func (m *monitor) listen() (*server, error) {
	path := m.store.RunDir(m.rec.ID, "sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	err := control.ShortPath(path, func(p string) (err error) {
		m.sock, err = listenUnix(p)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open the monitor's socket: %w", err)
	}
	// Whoever may connect rules the container.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	s := &server{m: m, done: make(chan struct{})}
	s.http = &http.Server{Handler: s, ConnContext: withConn, ErrorLog: log.New(os.Stderr, "", log.LstdFlags|log.LUTC)}
	s.http.SetKeepAlivesEnabled(false)
	go func() { // ended by close, or by settled, which closes the listener
		defer close(s.done)
		if err := s.http.Serve(m.sock); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			complain("serve", err)
		}
	}()
	return s, nil
}

// listenUnix is net.ListenUnix without the 64 KB in which package net reads how many connections may wait. The socket's file stays when it is
// closed: the short path may mean something else by then.
func listenUnix(path string) (net.Listener, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return l, nil
}

// close lets answers on their way out be completed, and ends the rest.
func (s *server) close() {
	ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
	defer cancel()
	if err := s.http.Shutdown(ctx); err != nil {
		s.http.Close()
	}
	<-s.done
}

// ServeHTTP implements http.Handler.
func (s *server) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	var err error
	switch q.Method + " " + q.URL.Path {
	case "GET /ping":
		err = answer(w, struct{}{})
	case "GET /wait":
		err = s.wait(w, q)
	case "GET /top":
		err = s.top(w)
	case "POST /kill":
		err = s.kill(w, q)
	case "POST /stop":
		err = s.stop(w, q)
	case "POST /resize":
		err = s.resize(w, q)
	case "POST /attach":
		err = s.attach(w, q)
	case "POST /freeze":
		err = s.freeze(w)
	case "POST /pause":
		err = s.pause(w)
	case "POST /unpause":
		err = s.unpause(w)
	case "POST /connect":
		err = s.connect(w, q)
	case "POST /disconnect":
		err = s.disconnect(w, q)
	case "POST /relink":
		err = s.relink(w)
	case "POST /update":
		err = s.update(w, q)
	case "POST /ports":
		err = s.ports(w, q)
	case "POST /exec":
		err = s.exec(w, q)
	default:
		err = &control.Error{Status: http.StatusNotFound, Message: "page not found"}
	}
	if err == nil {
		return
	}
	var e *control.Error
	if !errors.As(err, &e) {
		e = &control.Error{Status: http.StatusInternalServerError, Message: err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.Status)
	if err := json.NewEncoder(w).Encode(e); err != nil {
		complain("answer", err)
	}
}

// answer writes v. An error means that the client is gone, so it is not one.
func answer(w http.ResponseWriter, v any) error {
	b, err := plainjson.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
	return nil
}

func (s *server) need() (*run, error) {
	if r := s.m.present(); r != nil {
		return r, nil
	}
	return nil, &control.Error{Status: http.StatusConflict, Message: "container " + s.m.rec.ID + " is not running"}
}

// wait answers at the end of the present run, or of the next while the container restarts.
func (s *server) wait(w http.ResponseWriter, q *http.Request) error {
	s.m.mu.Lock()
	next := s.m.next
	s.m.mu.Unlock()
	select {
	case <-next:
	case <-q.Context().Done():
		return nil
	}
	s.m.mu.Lock()
	e := s.m.lastExit
	s.m.mu.Unlock()
	return answer(w, e)
}

func (s *server) top(w http.ResponseWriter) error {
	r, err := s.need()
	if err != nil {
		return err
	}
	pids, err := r.ct.Cgroup().Pids()
	if err != nil {
		return err
	}
	return answer(w, control.Processes{Pids: pids})
}

func (s *server) kill(w http.ResponseWriter, q *http.Request) error {
	sig := unix.SIGKILL
	if v := q.FormValue("signal"); v != "" {
		var err error
		if sig, err = container.ParseSignal(v); err != nil {
			return &control.Error{Status: http.StatusBadRequest, Message: err.Error()}
		}
	}
	// A signal that is meant to end the container is the user's wish that it stays ended.
	last := sig == unix.SIGKILL || sig == s.m.rec.StopSignal()
	r := s.m.present()
	switch between := s.m.status(); {
	case r != nil:
	case last && (between == container.Restarting || between == container.Starting):
		s.m.halt(true)
		if r = s.m.begun(0); r == nil {
			return answer(w, struct{}{})
		}
	case between == container.Starting:
		r = s.m.begun(-1)
	}
	if r == nil {
		_, err := s.need()
		return err
	}
	by := ender(q, cmp.Or(q.FormValue("for"), "kill"), sig)
	if last {
		s.m.halt(true)
		r.endedBy(by)
	} else {
		r.signalled(by)
	}
	if err := r.announced(sig); err != nil {
		if p := s.m.current().HostConfig.RestartPolicy; last && errors.Is(err, os.ErrProcessDone) && (p.IsAlways() || p.IsUnlessStopped()) {
			<-s.m.final // it has just ended by itself, and but for the wish it would begin again: as in the pause before that
			return answer(w, struct{}{})
		}
		if errors.Is(err, os.ErrProcessDone) {
			_, err = s.need()
			if err == nil {
				err = &control.Error{Status: http.StatusConflict, Message: "container " + s.m.rec.ID + " is not running"}
			}
		}
		return err
	}
	if last {
		r.freezing.dropAll(false)
	}
	if sig != unix.SIGKILL {
		return answer(w, struct{}{})
	}
	// Nobody survives this one, so whoever sent it finds the container ended, as with Docker.
	t := time.NewTimer(killTimeout)
	defer t.Stop()
	select {
	case <-s.m.final:
		return answer(w, struct{}{})
	case <-t.C:
		return &control.Error{Status: http.StatusInternalServerError, Message: "tried to kill container, but it has not ended: a process waits in the kernel"}
	}
}

// killTimeout is how long SIGKILL may take: a process that waits for a device or a network file system dies when the kernel lets it.
const killTimeout = 10 * time.Second

func (m *monitor) status() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Status
}

func (s *server) stop(w http.ResponseWriter, q *http.Request) error {
	sig := s.m.rec.StopSignal()
	if v := q.FormValue("signal"); v != "" {
		var err error
		if sig, err = container.ParseSignal(v); err != nil {
			return &control.Error{Status: http.StatusBadRequest, Message: err.Error()}
		}
	}
	seconds := s.m.rec.StopTimeout()
	if v := q.FormValue("t"); v != "" {
		var err error
		if seconds, err = strconv.Atoi(v); err != nil {
			return &control.Error{Status: http.StatusBadRequest, Message: "invalid timeout: " + v}
		}
	}
	s.m.halt(q.FormValue("for") != control.ForShutdown)
	// A start that is under way is waited for, or its run would have nobody who ends it.
	if r := s.m.begun(time.Duration(seconds) * time.Second); r != nil {
		by := ender(q, cmp.Or(q.FormValue("for"), "stop"), sig)
		by.Timeout = max(seconds, 0)
		r.endedBy(by)
		s.m.event("kill", map[string]string{"signal": strconv.Itoa(int(sig))})
		r.terminate(sig, time.Duration(seconds)*time.Second)
	}
	<-s.m.final
	if q.FormValue("for") != "rm" {
		s.m.event("stop", nil)
	}
	s.m.mu.Lock()
	e := s.m.lastExit
	s.m.mu.Unlock()
	return answer(w, e)
}

func (s *server) resize(w http.ResponseWriter, q *http.Request) error {
	h, err1 := strconv.ParseUint(q.FormValue("h"), 10, 16)
	wd, err2 := strconv.ParseUint(q.FormValue("w"), 10, 16)
	if err := errors.Join(err1, err2); err != nil {
		return &control.Error{Status: http.StatusBadRequest, Message: "invalid terminal size"}
	}
	r, err := s.need()
	if err != nil {
		return err
	}
	console := r.console
	if id := q.FormValue("exec"); id != "" {
		x := r.execution(id)
		if x == nil {
			return &control.Error{Status: http.StatusNotFound, Message: "No such exec instance: " + id}
		}
		console = x.console
	}
	if console == nil {
		return &control.Error{Status: http.StatusBadRequest, Message: "cannot resize: no terminal"}
	}
	rc, err := console.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = rc.Control(func(fd uintptr) {
		serr = tty.SetSize(int(fd), tty.Size{Rows: uint16(h), Cols: uint16(wd)})
	})
	if err := errors.Join(err, serr); err != nil {
		return err
	}
	if q.FormValue("exec") == "" {
		s.m.event("resize", map[string]string{"height": strconv.FormatUint(h, 10), "width": strconv.FormatUint(wd, 10)})
	}
	return answer(w, struct{}{})
}

// upgrade takes the connection over and sends the 101. The reader holds what the client sent already.
func upgrade(w http.ResponseWriter, header http.Header) (net.Conn, io.Reader, error) {
	hj, ok := w.(http.Hijacker)
	if !ok {
		return nil, nil, errors.New("connection can't be taken over")
	}
	conn, rw, err := hj.Hijack()
	if err != nil {
		return nil, nil, err
	}
	var b strings.Builder
	b.WriteString("HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n")
	if err := header.Write(&b); err != nil {
		conn.Close()
		return nil, nil, err
	}
	b.WriteString("\r\n")
	if _, err := conn.Write([]byte(b.String())); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, buffered(rw.Reader, conn), nil
}

// buffered reads what br holds and then conn directly, so that br's buffer is not kept for the connection's life.
func buffered(br *bufio.Reader, conn net.Conn) io.Reader {
	n := br.Buffered()
	if n == 0 {
		return conn
	}
	b, err := br.Peek(n)
	if err != nil {
		return br
	}
	return io.MultiReader(strings.NewReader(string(b)), conn)
}

func flag(q *http.Request, name string) bool {
	v := q.FormValue(name)
	return v == "1" || v == "true"
}

func (s *server) attach(w http.ResponseWriter, q *http.Request) error {
	r, err := s.need()
	if err != nil {
		return err
	}
	if r.freezing.paused() {
		return &control.Error{Status: http.StatusConflict, Message: "cannot attach to a paused container, unpause it first"}
	}
	conf := s.m.rec.Config
	conn, in, err := upgrade(w, http.Header{})
	if err != nil {
		return err
	}
	framed := flag(q, "framed")
	c := newClient(conn, framed || !conf.Tty, framed)
	c.skip = [3]bool{control.FrameStdout: !flag(q, "stdout"), control.FrameStderr: !flag(q, "stderr")}
	if r.io.attach(c) {
		r.io.feed(c, in, flag(q, "stdin") && conf.OpenStdin, conf.StdinOnce && !conf.Tty)
		s.m.event("attach", nil)
	}
	return nil
}

func (s *server) exec(w http.ResponseWriter, q *http.Request) error {
	var e control.ExecRequest
	if err := json.NewDecoder(q.Body).Decode(&e); err != nil {
		return &control.Error{Status: http.StatusBadRequest, Message: "invalid exec request: " + err.Error()}
	}
	r, err := s.need()
	if err != nil {
		return err
	}
	if r.freezing.paused() {
		return &control.Error{Status: http.StatusConflict, Message: "container " + s.m.rec.ID + " is paused, unpause the container before exec"}
	}
	name := strings.Join(e.Cmd, " ")
	x, err := r.exec(context.Background(), e, func(x *execution) error {
		s.m.event("exec_create: "+name, map[string]string{"execID": x.id})
		s.m.event("exec_start: "+name, map[string]string{"execID": x.id})
		if e.Detach {
			return answer(w, map[string]any{"id": x.id, "pid": x.proc.Pid()})
		}
		conn, in, err := upgrade(w, http.Header{control.HeaderExecID: {x.id}})
		if err != nil {
			return err
		}
		framed := flag(q, "framed")
		c := newClient(conn, framed || !e.Tty, framed)
		x.io.attach(c)
		x.io.feed(c, in, e.Stdin, !e.Tty)
		return nil
	})
	if err != nil {
		return execError(err)
	}
	finish := func() {
		exit := x.wait()
		if err := r.track(x, false); err != nil {
			complain("record exec", err)
		}
		s.m.event("exec_die", map[string]string{"execID": x.id, "exitCode": strconv.Itoa(exit.Code)})
		x.io.finish(exit)
		s.m.calm()
	}
	go finish() // ends with the process, at the latest with the container's
	return nil
}
