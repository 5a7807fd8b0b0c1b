package test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/moby/moby/api/types/jsonstream"
)

// slowRegistry has an image of 12 MB that takes minutes to come, until hurry is called: a second or two then.
func slowRegistry(t *testing.T, w *world) (name string, hurry func()) {
	t.Helper()
	r := w.serveRegistry()
	r.put("slow:1", forms[0].image(t, "linux/amd64", tarOf(t, map[string][]byte{"a": noise(1, 6<<20)}), tarOf(t, map[string][]byte{"b": noise(2, 6<<20)})))
	line := &pacer{perSecond: 64 << 10}
	r.behave(func(*http.Request) conduct { return conduct{pace: line} })
	return r.addr + "/slow:1", func() { line.become(8 << 20) }
}

// On a terminal a pull shows bars, no line is wider than the terminal, and Ctrl-C leaves it with a cursor.
func TestProgressOnTerminal(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	name, hurry := slowRegistry(t, w)
	for _, interrupt := range []bool{true, false} {
		if !interrupt {
			hurry()
		}
		cmd := w.command("pull", name)
		cmd.Env = append(cmd.Env, "TERM=xterm")
		var term *os.File
		var err error
		w.inNetns(func() { term, err = pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 72}) })
		if err != nil {
			t.Fatal(err)
		}
		var seen bytes.Buffer
		buf := make([]byte, 4096)
		for sent := false; ; {
			n, err := term.Read(buf)
			seen.Write(buf[:n])
			if interrupt && !sent && strings.Contains(seen.String(), "Downloading") {
				sent = true
				if _, err := term.Write([]byte{3}); err != nil {
					t.Fatal(err)
				}
			}
			if err != nil { // EIO: the last process with the terminal is gone
				break
			}
		}
		term.Close()
		cmd.Wait()
		out := seen.String()
		if want := map[bool]int{true: 130, false: 0}[interrupt]; cmd.ProcessState.ExitCode() != want {
			t.Errorf("interrupted: %t, exit code %d, want %d\n%s", interrupt, cmd.ProcessState.ExitCode(), want, out)
		}
		if hide, show := strings.Count(out, "\x1b[?25l"), strings.Count(out, "\x1b[?25h"); hide != show || hide == 0 || strings.LastIndex(out, "\x1b[?25l") > strings.LastIndex(out, "\x1b[?25h") {
			t.Errorf("the cursor was hidden %d times and shown %d times", hide, show)
		}
		if !interrupt && (!strings.Contains(out, "B/s") || !strings.Contains(out, ": Pull complete") || !strings.Contains(out, "\nTotal ") || !strings.HasSuffix(out, name+"\r\n")) {
			t.Errorf("it shows\n%s", out)
		}
		for line := range strings.Lines(out) {
			line = strings.TrimRight(line, "\r\n")
			if i := strings.LastIndex(line, "\x1b[K"); i >= 0 {
				if line = line[:i]; strings.Contains(line, "\r") {
					line = line[strings.LastIndexByte(line, '\r')+1:]
				}
				if len(line) > 71 && !strings.HasPrefix(line, "Digest") && !strings.HasPrefix(line, "Status") {
					t.Errorf("%d columns: %q", len(line), line)
				}
			}
		}
	}
}

// What is not a terminal gets a line for each change, or an object; an error is an object too.
func TestProgressPiped(t *testing.T) {
	w := bareWorld(t)
	w.netns = newNetns(t)
	name, hurry := slowRegistry(t, w)
	cmd := w.command("pull", "--progress", "json", name)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.start(cmd)
	// Only who sees it on its way has it come to an end.
	unseen := time.AfterFunc(giveUp, func() { cmd.Process.Kill() }) //nolint:errcheck // it may have ended
	defer unseen.Stop()
	lines := 0
	last := map[string]string{}
	moved := int64(0)
	sc := bufio.NewScanner(pipe)
	for sc.Scan() {
		var m jsonstream.Message
		if err := json.Unmarshal(sc.Bytes(), &m); err != nil {
			t.Errorf("%s: %v", sc.Text(), err)
		}
		lines++
		if m.ID != "" {
			last[m.ID] = m.Status
		}
		if m.Progress != nil && m.Status == "Downloading" {
			moved = max(moved, m.Progress.Current)
			if moved > 0 && unseen.Stop() {
				hurry()
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	complete := 0
	for _, s := range last {
		if s == "Pull complete" {
			complete++
		}
	}
	if complete != 2 || moved == 0 || lines < 8 {
		t.Errorf("%d lines, %d layers complete, %d bytes seen on their way", lines, complete, moved)
	}

	w.conex("rmi", name)
	plain := w.conex("pull", "--progress", "plain", name)
	for line := range strings.Lines(plain) {
		if strings.ContainsAny(line, "\x1b\r[") {
			t.Errorf("plain has %q", line)
		}
	}
	if strings.Count(plain, ": Pull complete\n") != 2 || strings.Contains(plain, "Downloading") {
		t.Errorf("plain is\n%s", plain)
	}
	if got := w.conex("pull", "--progress", "quiet", name); got != name {
		t.Errorf("quiet is\n%s", got)
	}

	r := w.try("pull", "--progress", "json", strings.Replace(name, "slow", "none", 1))
	var m jsonstream.Message
	dec := json.NewDecoder(strings.NewReader(r.stdout))
	for err = nil; err == nil; err = dec.Decode(&m) {
	}
	if err != io.EOF || m.Error == nil || m.Error.Code != 1 || !strings.HasSuffix(r.stderr, m.Error.Message+"\n") || r.code != 1 {
		t.Errorf("%d, %v, %+v, %s", r.code, err, m, r.stderr)
	}
}
