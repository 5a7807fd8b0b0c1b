package logs

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const said = "one\n\n  \na\x00b\r\nno end"

// speak logs what a container says, and closes the log.
func speak(t *testing.T, driver string, opts map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	w := newWriter(t, dir, opts, driver)
	write(t, w, "stderr", "two\n", t0)
	write(t, w, "stdout", said[:2], t0)
	write(t, w, "stdout", said[2:], t0)
	closeLog(t, w)
	return dir
}

// heard are the messages of speak by Docker 20.10 in each format, without time and host.
func heard(format, tag string) []string {
	head := map[string]string{
		"":             "<%d>TIME TAG[PID]: %s\n",
		"rfc3164":      "<%d>TIME HOST TAG[PID]: %s\n",
		"rfc5424":      "<%d>1 TIME HOST TAG PID TAG - %s\n",
		"rfc5424micro": "<%d>1 TIME HOST TAG PID TAG - %s\n",
	}[format]
	head = strings.ReplaceAll(head, "TAG", tag)
	var out []string
	for _, m := range []struct {
		priority int
		text     string
	}{{27, "two"}, {30, "one"}, {30, "  "}, {30, "a\x00b\r"}, {30, "no end"}} {
		out = append(out, fmt.Sprintf(head, m.priority, m.text))
	}
	return out
}

var times = map[string]*regexp.Regexp{
	"":             regexp.MustCompile(`[A-Z][a-z][a-z] [ 123]\d \d\d:\d\d:\d\d`),
	"rfc3164":      regexp.MustCompile(`[A-Z][a-z][a-z] [ 123]\d \d\d:\d\d:\d\d`),
	"rfc5424":      regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)`),
	"rfc5424micro": regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)`),
}

// same compares messages with heard.
func same(t *testing.T, got []string, format, tag string) {
	t.Helper()
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Join(heard(format, tag), "")
	var b strings.Builder
	for _, m := range got {
		m = times[format].ReplaceAllString(m, "TIME")
		m = strings.Replace(m, " "+host+" ", " HOST ", 1)
		b.WriteString(strings.Replace(m, strconv.Itoa(os.Getpid()), "PID", 1))
	}
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestSyslogDatagrams(t *testing.T) {
	for _, network := range []string{"udp", "unixgram"} {
		for format := range times {
			t.Run(network+" "+format, func(t *testing.T) {
				addr := "127.0.0.1:0"
				if network == "unixgram" {
					addr = filepath.Join(t.TempDir(), "sock")
				}
				l, err := net.ListenPacket(network, addr)
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				dir := speak(t, Syslog, map[string]string{
					"syslog-address": network + "://" + l.LocalAddr().String(), "syslog-format": format, "tag": "{{.Name}}/{{.ID}}",
				})
				var got []string
				buf := make([]byte, 1<<16)
				for range len(heard(format, "")) {
					n, _, err := l.ReadFrom(buf)
					if err != nil {
						t.Fatal(err)
					}
					got = append(got, string(buf[:n]))
				}
				same(t, got, format, "box/0123456789ab")
				if copied := text(all(t, dir, ReadOptions{Tail: -1, Stdout: true})); copied != said {
					t.Errorf("the copy has %q", copied)
				}
			})
		}
	}
}

func TestSyslogStreams(t *testing.T) {
	cert, ca := certificate(t)
	for _, network := range []string{"tcp", "unix", "tcp+tls"} {
		for format := range times {
			t.Run(network+" "+format, func(t *testing.T) {
				opts := map[string]string{"syslog-format": format, "cache-disabled": "true", "syslog-facility": "daemon"}
				var l net.Listener
				var err error
				switch network {
				case "unix":
					l, err = net.Listen("unix", filepath.Join(t.TempDir(), "sock"))
				case "tcp":
					l, err = net.Listen("tcp", "127.0.0.1:0")
				default:
					l, err = tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
					opts["syslog-tls-ca-cert"] = ca
				}
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				opts["syslog-address"] = network + "://" + l.Addr().String()
				got := make(chan []string)
				go func() {
					defer close(got)
					conn, err := l.Accept()
					if err != nil {
						return
					}
					defer conn.Close()
					var lines []string
					for r := bufio.NewReader(conn); ; {
						if network == "tcp+tls" && strings.HasPrefix(format, "rfc5424") {
							length, err := r.ReadString(' ')
							if err != nil {
								break
							}
							n, err := strconv.Atoi(strings.TrimSuffix(length, " "))
							if err != nil {
								t.Error(err)
							}
							b := make([]byte, n)
							if _, err := io.ReadFull(r, b); err != nil {
								t.Error(err)
							}
							lines = append(lines, string(b))
							continue
						}
						line, err := r.ReadString('\n')
						if err != nil {
							break
						}
						lines = append(lines, line)
					}
					got <- lines
				}()
				dir := speak(t, Syslog, opts)
				same(t, <-got, format, "0123456789ab")
				if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
					t.Errorf("a copy was kept: %v, %v", left, err)
				}
			})
		}
	}
	// A certificate that nobody vouches for is refused.
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(io.Discard, conn); conn.Close() }()
		}
	}()
	addr := "tcp+tls://" + l.Addr().String()
	if _, err := open(t.TempDir(), map[string]string{"syslog-address": addr}, Syslog); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an unknown authority: %v", err)
	}
	w, err := open(t.TempDir(), map[string]string{"syslog-address": addr, "syslog-tls-skip-verify": "true"}, Syslog)
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, w)
}

// certificate makes one for 127.0.0.1, and a file with its authority, itself.
func certificate(t *testing.T) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "syslog"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, file
}

// TestSyslogServerStops has the server go away and come back: the container waits for nothing, and is told of what was lost.
func TestSyslogServerStops(t *testing.T) {
	old := [...]time.Duration{sendTimeout, firstPause}
	sendTimeout, firstPause = 50*time.Millisecond, 20*time.Millisecond
	defer func() { sendTimeout, firstPause = old[0], old[1] }()
	sock := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	w := newWriter(t, dir, map[string]string{"syslog-address": "unix://" + sock}, Syslog)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	write(t, w, "stdout", "first\n", t0)
	// It reads nothing any more: a write fails after its time, and the next ones at once.
	flood := strings.Repeat(strings.Repeat("x", 99)+"\n", 10000)
	began := time.Now()
	failures := 0
	for range 10 {
		if w.Write("stdout", []byte(flood), t0) != nil {
			failures++
		}
	}
	if failures == 0 || time.Since(began) > time.Minute { // 100,000 messages that each wait for their time would take more than an hour
		t.Errorf("%d failures in %v", failures, time.Since(began))
	}
	conn.Close()
	l.Close()
	if l, err = net.Listen("unix", sock); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	heard := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		r := bufio.NewReader(conn)
		for {
			line, err := r.ReadString('\n')
			if err != nil || strings.HasSuffix(line, ": last\n") {
				heard <- line
				return
			}
			if strings.Contains(line, "could not be sent") {
				heard <- line
			}
		}
	}()
	// What is tried while it is left alone is lost as well, so some more is said until the first word arrives.
	for done := false; !done; {
		if err := w.Write("stdout", []byte("again\n"), t0); err != nil {
			t.Log(err)
		}
		select {
		case line := <-heard:
			if !strings.Contains(line, "messages could not be sent]") {
				t.Errorf("heard %q", line)
			}
			done = true
		case <-time.After(5 * time.Millisecond):
		}
	}
	write(t, w, "stdout", "last\n", t0)
	if line := <-heard; !strings.HasSuffix(line, ": last\n") {
		t.Errorf("heard %q", line)
	}
	closeLog(t, w)
	copied := text(all(t, dir, whole))
	if !strings.HasPrefix(copied, "first\n"+flood) || !strings.HasSuffix(copied, "again\nlast\n") {
		t.Errorf("the copy has %d bytes", len(copied))
	}
}

// journal listens in the journal's place.
func journal(t *testing.T) *net.UnixConn {
	t.Helper()
	old := journalSocket
	journalSocket = filepath.Join(t.TempDir(), "socket")
	t.Cleanup(func() { journalSocket = old })
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: journalSocket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// entry reads one entry of the journal.
func entry(t *testing.T, l *net.UnixConn) map[string]string {
	t.Helper()
	b, oob := make([]byte, 1<<20), make([]byte, 100)
	if err := l.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, on, _, _, err := l.ReadMsgUnix(b, oob)
	if err != nil {
		t.Fatal(err)
	}
	b = b[:n]
	if on > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:on])
		if err != nil {
			t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fds[0]), "memfd")
		defer f.Close()
		if b, err = io.ReadAll(io.NewSectionReader(f, 0, 1<<30)); err != nil {
			t.Fatal(err)
		}
		if seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil || seals&unix.F_SEAL_WRITE == 0 {
			t.Errorf("seals %#x, %v", seals, err)
		}
	}
	fields := map[string]string{}
	for len(b) > 0 {
		i := bytes.IndexAny(b, "=\n")
		name := string(b[:i])
		end := bytes.IndexByte(b, '\n')
		if b[i] == '=' {
			fields[name] = string(b[i+1 : end])
		} else {
			size := int(binary.LittleEndian.Uint64(b[i+1:]))
			end = i + 9 + size
			fields[name] = string(b[i+9 : end])
		}
		if b[end] != '\n' {
			t.Fatalf("field %s has no end", name)
		}
		b = b[end+1:]
	}
	return fields
}

func TestJournal(t *testing.T) {
	l := journal(t)
	dir := t.TempDir()
	opts := map[string]string{"tag": "{{.Name}}", "labels": "a.b,none", "env-regex": "^(FOO|HUGE)$"}
	o, err := ParseOptions(Journald, opts)
	if err != nil {
		t.Fatal(err)
	}
	c := Container{
		ContainerID: strings.Repeat("0123456789abcdef", 4), ContainerName: "/box", ContainerImageName: "img", ContainerLabels: map[string]string{"a.b": "x", "other": "y"},
		ContainerEnv: []string{"FOO=b\nMESSAGE=forged", "HUGE=" + strings.Repeat("h", 300000), "BAR=z"},
	}
	w, err := Open(dir, c, o)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 40000)
	go func() {
		write(t, w, "stdout", "one\n\n", t0)
		write(t, w, "stderr", "two\n", t0)
		write(t, w, "stdout", long+"\nno end", t0)
		closeLog(t, w)
	}()
	want := map[string]string{
		"CONTAINER_ID": "0123456789ab", "CONTAINER_ID_FULL": c.ContainerID, "CONTAINER_NAME": "box", "CONTAINER_TAG": "box", "IMAGE_NAME": "img",
		"SYSLOG_IDENTIFIER": "box", "A_B": "x", "FOO": "b\nMESSAGE=forged", "HUGE": strings.Repeat("h", 300000),
	}
	var ids []string
	for i, m := range []struct{ message, priority, ordinal, last string }{
		{"one", "6", "", ""}, {"", "6", "", ""}, {"two", "3", "", ""},
		{long[:maxLine], "6", "1", "false"}, {long[:maxLine], "6", "2", "false"}, {long[2*maxLine:], "6", "3", "true"}, {"no end", "6", "1", "false"},
	} {
		e := entry(t, l)
		for k, v := range want {
			if e[k] != v {
				t.Errorf("message %d: %s is %.50q", i, k, e[k])
			}
		}
		partial := ""
		if m.last == "false" {
			partial = "true"
		}
		if e["MESSAGE"] != m.message || e["PRIORITY"] != m.priority || e["CONTAINER_PARTIAL_ORDINAL"] != m.ordinal || e["CONTAINER_PARTIAL_LAST"] != m.last ||
			e["CONTAINER_PARTIAL_MESSAGE"] != partial || (e["CONTAINER_PARTIAL_ID"] != "") != (m.ordinal != "") || e["CONTAINER_LOG_ORDINAL"] != strconv.Itoa(i+1) {
			t.Errorf("message %d: %.50q %v", i, e["MESSAGE"], e)
		}
		ids = append(ids, e["CONTAINER_PARTIAL_ID"])
		if _, ok := e["OTHER"]; ok || e["BAR"] != "" {
			t.Errorf("message %d has more than was asked for", i)
		}
	}
	if ids[3] != ids[4] || ids[4] != ids[5] || ids[5] == ids[6] {
		t.Errorf("ids of partial messages: %q", ids[3:])
	}
	if got := text(all(t, dir, ReadOptions{Tail: -1, Stdout: true})); got != "one\n\n"+long+"\nno end" {
		t.Errorf("the copy has %d bytes", len(got))
	}
	journalSocket = "/nowhere"
	if _, err := open(t.TempDir(), nil, Journald); err == nil || err.Error() != "journald is not enabled on this host" {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	o, err := ParseOptions("", map[string]string{"max-size": "2k", "max-file": "3", "compress": "false", "mode": "non-blocking", "max-buffer-size": "2m"})
	if err != nil || o.Driver != Local || o.Files != (FileOptions{2048, 3, false}) || !o.NonBlocking || o.MaxBuffer != 2<<20 {
		t.Errorf("%+v, %v", o, err)
	}
	for driver, want := range map[string]string{
		"":       "local, at most 5 files of 20MiB, full ones compressed",
		JSONFile: "json-file, at most 5 files of 20MiB, full ones compressed",
		Journald: "journald and a copy, at most 5 files of 20MiB, full ones compressed",
		None:     "none",
	} {
		if o, err := ParseOptions(driver, nil); err != nil || o.String() != want {
			t.Errorf("%s: %s, %v", driver, o, err)
		}
	}
	// The words are Docker's where it has any.
	for _, bad := range []struct{ driver, key, value, want string }{
		{"", "max-size", "0", "log option max-size=0: must be positive, or -1 for no bound"},
		{"", "max-size", "x", "log option max-size=x: invalid size: 'x'"},
		{"", "max-file", "0", "log option max-file=0: must be at least 1"},
		{"", "max-file", "x", ""},
		{"", "compress", "maybe", ""},
		{"", "mode", "fast", "logger: logging mode not supported: fast"},
		{"", "max-buffer-size", "2m", "logger: max-buffer-size option is only supported with 'mode=non-blocking'"},
		{"", "colour", "red", "unknown log opt 'colour' for local log driver"},
		{JSONFile, "foo", "bar", "unknown log opt 'foo' for json-file log driver"},
		{JSONFile, "tag", "{{.Nope", ""},
		{JSONFile, "env-regex", "(", ""},
		{Journald, "max-size", "1m", "unknown log opt 'max-size' for journald log driver"},
		{None, "max-size", "1m", "invalid logging opts for driver none"},
		{Syslog, "syslog-address", "foo", "syslog-address should be in form proto://address, got foo"},
		{Syslog, "syslog-address", "unix:///nowhere", ""},
		{Syslog, "syslog-address", "tcp://", "syslog-address should be in form proto://address, got tcp://"},
		{Syslog, "syslog-facility", "foo", "invalid syslog facility"},
		{Syslog, "syslog-facility", "24", "invalid syslog facility"},
		{Syslog, "syslog-format", "foo", "Invalid syslog format"},
		{Syslog, "syslog-tls-skip-verify", "foo", ""},
		{"fluentd", "", "", `log driver "fluentd": not supported: fluentd and Fluent Bit read the driver syslog (their input syslog) and journald (systemd)`},
		{"foo", "", "", `log driver "foo": not supported, there are journald, json-file, local, syslog and none`},
	} {
		opts := map[string]string{}
		if bad.key != "" {
			opts[bad.key] = bad.value
		}
		if _, err := ParseOptions(bad.driver, opts); err == nil || bad.want != "" && err.Error() != bad.want {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	for v, want := range map[string]int{"": 3, "kern": 0, "local7": 23, "16": 16} {
		if o, err := ParseOptions(Syslog, map[string]string{"syslog-facility": v}); err != nil || o.Syslog.Facility != want {
			t.Errorf("facility %q: %d, %v", v, o.Syslog.Facility, err)
		}
	}
	for addr, want := range map[string]string{"udp://h": "h:514", "tcp://h:99": "h:99", "tcp+tls://[::1]": "[::1]:514"} {
		if o, err := ParseOptions(Syslog, map[string]string{"syslog-address": addr}); err != nil || o.Syslog.Address != want {
			t.Errorf("%s: %s, %v", addr, o.Syslog.Address, err)
		}
	}
	dir := filepath.Join(t.TempDir(), "none")
	w, err := open(dir, nil, None)
	if err != nil {
		t.Fatal(err)
	}
	write(t, w, "stdout", "x\n", t0)
	closeLog(t, w)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the driver none made a folder: %v", err)
	}
}

func TestTagsAndDetails(t *testing.T) {
	c := Container{
		ContainerID: "0123456789abcdef", ContainerName: "/box", ContainerImageID: "sha256:fedcba9876543210", ContainerImageName: "img:1", ContainerEntrypoint: "sh",
		ContainerArgs: []string{"-c", "x y"}, DaemonName: "conex", ContainerLabels: map[string]string{"l": "a b", "m": "2"}, ContainerEnv: []string{"E=1", "F=2", "G"},
	}
	for text, want := range map[string]string{
		"{{.ID}} {{.FullID}}": "0123456789ab 0123456789abcdef", "{{.Name}}/{{.ImageName}}": "box/img:1", "{{.ImageID}}": "fedcba987654",
		"{{.Command}}": "sh -c x y", "{{.DaemonName}}": "conex", `{{upper .Name}}{{index .ContainerLabels "m"}}`: "BOX2", `{{json .ContainerArgs}}`: `["-c","x y"]`,
	} {
		if got, err := c.tag(text); err != nil || got != want {
			t.Errorf("%s: %q, %v", text, got, err)
		}
	}
	if _, err := c.tag("{{.Nope}}"); err == nil {
		t.Error("no error for a field that isn't there")
	}
	for want, opts := range map[string]map[string]string{
		" ":                  nil,
		"E=1,l=a+b ":         {"labels": "l,none", "env": "E"},
		"E=1,F=2,l=a+b,m=2 ": {"labels-regex": "^[lm]$", "env-regex": "."},
		"tag=box ":           {"tag": "{{.Name}}"},
	} {
		o, err := ParseOptions(JSONFile, opts)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := c.Details(o); err != nil || got != want {
			t.Errorf("%v: %q, %v", opts, got, err)
		}
	}
	dir := t.TempDir()
	w := newWriter(t, dir, map[string]string{"tag": "{{.Name}}"}, JSONFile)
	write(t, w, "stdout", "hello\n", t0)
	closeLog(t, w)
	b, err := os.ReadFile(CurrentPath(dir))
	if want := `{"log":"hello\n","stream":"stdout","attrs":{"tag":"box"},"time":"2026-01-02T03:04:05.678901234Z"}` + "\n"; err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
	if got := text(all(t, dir, whole)); got != "hello\n" {
		t.Errorf("read %q", got)
	}
}
