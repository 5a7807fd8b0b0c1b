package logs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 678901234, time.UTC)

// open opens a log for writing, in the way that a monitor does.
func open(dir string, opts map[string]string, driver string) (Driver, error) {
	o, err := ParseOptions(driver, opts)
	if err != nil {
		return nil, err
	}
	return Open(dir, Container{ContainerID: "0123456789abcdef", ContainerName: "/box"}, o)
}

func newWriter(t testing.TB, dir string, opts map[string]string, driver string) Driver {
	t.Helper()
	w, err := open(dir, opts, driver)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func write(t testing.TB, w Driver, stream, s string, at time.Time) {
	t.Helper()
	if err := w.Write(stream, []byte(s), at); err != nil {
		t.Fatal(err)
	}
}

// eachFormat runs a test for both formats of files.
func eachFormat(t *testing.T, fn func(t *testing.T, driver string)) {
	for _, driver := range []string{Local, JSONFile} {
		t.Run(driver, func(t *testing.T) { fn(t, driver) })
	}
}

func closeLog(t testing.TB, w Driver) {
	t.Helper()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// all reads everything that the options choose.
func all(t testing.TB, dir string, o ReadOptions) []Record {
	t.Helper()
	var out []Record
	err := Read(t.Context(), dir, o, func(r Record) error {
		r.Line = bytes.Clone(r.Line)
		out = append(out, r)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func text(recs []Record) string {
	var b strings.Builder
	for _, r := range recs {
		b.Write(r.Line)
	}
	return b.String()
}

var whole = ReadOptions{Tail: -1}

func TestLinesAreDockers(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, dir, nil, JSONFile)
	write(t, w, "stdout", "hello\nw\"o\\r\x01ld\t<é>\r\n", t0)
	write(t, w, "stderr", "bad \xff\n", t0.Add(766*time.Nanosecond))
	write(t, w, "stdout", "no ", t0.Truncate(time.Second))
	write(t, w, "stdout", "end", t0)
	closeLog(t, w)
	b, err := os.ReadFile(CurrentPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"log":"hello\n","stream":"stdout","time":"2026-01-02T03:04:05.678901234Z"}
{"log":"w\"o\\r\u0001ld\t<é>\r\n","stream":"stdout","time":"2026-01-02T03:04:05.678901234Z"}
{"log":"bad \ufffd\n","stream":"stderr","time":"2026-01-02T03:04:05.678902Z","raw":"YmFkIP8K"}
{"log":"no end","stream":"stdout","time":"2026-01-02T03:04:05Z"}
`
	if string(b) != want {
		t.Errorf("got\n%swant\n%s", b, want)
	}
	for line := range bytes.Lines(b) {
		if !json.Valid(line) {
			t.Errorf("not JSON: %s", line)
		}
	}
	recs := all(t, dir, whole)
	if got := text(recs); got != "hello\nw\"o\\r\x01ld\t<é>\r\nbad \xff\nno end" {
		t.Errorf("read %q", got)
	}
	if len(recs) != 4 || recs[2].Stream != "stderr" || !recs[0].Time.Equal(t0) || !recs[3].Partial || recs[0].Partial {
		t.Errorf("records %+v", recs)
	}
}

func TestLongLines(t *testing.T) { eachFormat(t, testLongLines) }

func testLongLines(t *testing.T, driver string) {
	dir := t.TempDir()
	w := newWriter(t, dir, nil, driver)
	long := strings.Repeat("é", 20000) + "\n" // 40,001 bytes
	write(t, w, "stdout", "a\n"+long[:100], t0)
	write(t, w, "stderr", "between\n", t0)
	write(t, w, "stdout", long[100:]+"b\n"+strings.Repeat("x", maxLine)+"\n", t0)
	closeLog(t, w)
	var out []string
	for _, r := range all(t, dir, ReadOptions{Tail: -1, Stdout: true}) {
		if len(r.Line) > maxLine {
			t.Errorf("a piece has %d bytes", len(r.Line))
		}
		if r.Continued {
			out[len(out)-1] += string(r.Line)
		} else {
			out = append(out, string(r.Line))
		}
	}
	if want := []string{"a\n", long, "b\n", strings.Repeat("x", maxLine) + "\n"}; !slices.Equal(out, want) {
		t.Errorf("joined lines differ: %d lines", len(out))
	}
	if b, err := os.ReadFile(CurrentPath(dir)); driver == JSONFile && (err != nil || bytes.Contains(b, []byte("raw"))) {
		t.Errorf("a character was cut in two, %v", err)
	}
}

// fill writes numbered lines, so many that the log rotates.
func fill(t testing.TB, w Driver, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		stream := "stdout"
		if i%3 == 0 {
			stream = "stderr"
		}
		write(t, w, stream, fmt.Sprintf("line %d\n", i), t0.Add(time.Duration(i)*time.Second))
	}
}

func numbered(from, to int) string {
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.String()
}

func TestRotation(t *testing.T) {
	eachFormat(t, func(t *testing.T, driver string) {
		t.Run("compressed", func(t *testing.T) { rotation(t, driver, "true") })
		t.Run("plain", func(t *testing.T) { rotation(t, driver, "false") })
	})
}

func rotation(t *testing.T, driver, compressed string) {
	dir := t.TempDir()
	size := map[string]int64{Local: 3, JSONFile: 10}[driver] // of so many KB there are three with 300 lines
	opts := map[string]string{"max-size": fmt.Sprint(size, "k"), "max-file": "4", "compress": compressed}
	o, err := ParseOptions(driver, opts)
	if err != nil {
		t.Fatal(err)
	}
	packed := func() (n int) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				t.Fatal(err)
			}
			if info.Size() > size<<10 {
				t.Errorf("%s has %d bytes", e.Name(), info.Size())
			}
			if strings.HasSuffix(e.Name(), ".gz") || strings.HasSuffix(e.Name(), ".zst") {
				n++
			}
		}
		if len(entries) > 5 { // four files and the link
			t.Errorf("%d entries in the folder", len(entries))
		}
		return n
	}
	w := newWriter(t, dir, opts, driver)
	fill(t, w, 0, 300)
	closeLog(t, w)
	for _, pack := range []bool{false, true} {
		if pack {
			if err := Compress(dir, o); err != nil {
				t.Fatal(err)
			}
			if n := packed(); (n > 0) != (compressed == "true") {
				t.Errorf("%d compressed files", n)
			}
		}
		if got := text(all(t, dir, whole)); got != numbered(0, 300) {
			t.Errorf("read %d bytes, want the 300 lines", len(got))
		}
		for _, n := range []int{0, 1, 7, 120, 121, 130, 260, 299, 300, 301, 5000} {
			if got, want := text(all(t, dir, ReadOptions{Tail: n})), numbered(max(0, 300-n), 300); got != want {
				t.Errorf("tail %d: %d bytes, want %d", n, len(got), len(want))
			}
		}
		for _, from := range []int{0, 1, 149, 150, 299} {
			o := ReadOptions{Tail: -1, Since: t0.Add(time.Duration(from) * time.Second), Until: t0.Add(200 * time.Second)}
			if got := text(all(t, dir, o)); got != numbered(from, max(from, 201)) {
				t.Errorf("since %d and until: %q", from, got)
			}
		}
		for _, r := range all(t, dir, ReadOptions{Tail: -1, Stderr: true}) {
			if r.Stream != "stderr" {
				t.Fatal("stdout among stderr")
			}
		}
	}

	// A second writer goes on, and the bound holds.
	w = newWriter(t, dir, opts, driver)
	fill(t, w, 300, 2000)
	closeLog(t, w)
	got := text(all(t, dir, whole))
	if len(got) < 1000 || !strings.HasSuffix(numbered(0, 2000), got) {
		t.Errorf("read %d bytes that aren't the end of what was written", len(got))
	}
	packed()
}

func TestFollow(t *testing.T) { eachFormat(t, testFollow) }

func testFollow(t *testing.T, driver string) {
	dir := t.TempDir()
	w := newWriter(t, dir, map[string]string{"max-size": "10k", "max-file": "1000"}, driver)
	fill(t, w, 0, 50)
	done := make(chan struct{})
	got := make(chan string)
	lines := make(chan int, 10000)
	for i := range 3 {
		go func() {
			var b strings.Builder
			tail := []int{-1, 10, 0}[i]
			err := Read(t.Context(), dir, ReadOptions{Follow: true, Tail: tail, Done: done}, func(r Record) error {
				b.Write(r.Line)
				if i == 0 {
					lines <- 1
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			s := b.String()
			if i == 2 { // it may have begun anywhere
				if !strings.HasSuffix(numbered(0, 3000), s) {
					t.Error("tail 0 gave something else than an end of the log")
				}
				s = numbered(0, 3000)
			}
			if i == 1 {
				if !strings.HasSuffix(numbered(0, 3000), s) || len(s) < len(numbered(2990, 3000)) {
					t.Error("tail 10 gave something else than an end of the log")
				}
				s = numbered(0, 3000)
			}
			got <- s
		}()
	}
	for range 50 { // the first follower has what was there
		<-lines
	}
	fill(t, w, 50, 3000)
	for range 2950 { // and gets all that comes, without the end of the log
		<-lines
	}
	closeLog(t, w)
	close(done)
	for range 3 {
		if s := <-got; s != numbered(0, 3000) {
			t.Errorf("followed %d bytes, want %d", len(s), len(numbered(0, 3000)))
		}
	}
}

func TestFollowEnds(t *testing.T) { eachFormat(t, testFollowEnds) }

func testFollowEnds(t *testing.T, driver string) {
	dir := filepath.Join(t.TempDir(), "later")
	first := make(chan struct{})
	follow := func(ctx context.Context, o ReadOptions) chan error {
		o.Follow, o.Tail = true, -1
		errc := make(chan error)
		go func() { errc <- Read(ctx, dir, o, func(Record) error { close(first); return nil }) }()
		return errc
	}
	// It begins before there is a log.
	ctx, cancel := context.WithCancel(t.Context())
	errc := follow(ctx, ReadOptions{})
	w := newWriter(t, dir, nil, driver)
	write(t, w, "stdout", "hello\n", t0)
	<-first
	cancel()
	if err := <-errc; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// Until in the past and in the (near) future end it without an error.
	for _, u := range []time.Time{t0.Add(-time.Second), time.Now().Add(10 * time.Millisecond)} {
		first = make(chan struct{})
		if err := <-follow(t.Context(), ReadOptions{Until: u}); err != nil {
			t.Errorf("until %v: %v", u, err)
		}
	}
	// The callback's error comes back.
	mine := errors.New("mine")
	if err := Read(t.Context(), dir, ReadOptions{Tail: -1}, func(Record) error { return mine }); err != mine {
		t.Errorf("callback's error: %v", err)
	}
	// The container is removed, in either way.
	first = make(chan struct{})
	errc = follow(t.Context(), ReadOptions{})
	<-first
	moved := dir + "-moved"
	if err := os.Rename(dir, moved); err != nil {
		t.Fatal(err)
	}
	if err := <-errc; err != nil {
		t.Errorf("moved away: %v", err)
	}
	if err := os.Rename(moved, dir); err != nil {
		t.Fatal(err)
	}
	first = make(chan struct{})
	errc = follow(t.Context(), ReadOptions{})
	<-first
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := <-errc; err != nil {
		t.Errorf("removed: %v", err)
	}
	if recs := all(t, dir, whole); len(recs) != 0 {
		t.Errorf("no log: %v", recs)
	}
}

func TestCrashesJSON(t *testing.T) {
	const driver = JSONFile
	dir := t.TempDir()
	opts := map[string]string{"max-size": "10k", "max-file": "4"}
	w := newWriter(t, dir, opts, driver)
	fill(t, w, 0, 200)
	closeLog(t, w)
	if err := pack(dir, nil); err != nil {
		t.Fatal(err)
	}
	current, err := filepath.EvalSymlinks(CurrentPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	// Torn last line, a half compressed file, a full file that is there twice, nonsense.
	b, err := os.ReadFile(current)
	if err != nil {
		t.Fatal(err)
	}
	torn := append(slices.Clone(b), []byte("\x00\x00\nnonsense\n{\"log\":\"half")...)
	if err := os.WriteFile(current, torn, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]string{"00000001.json": numbered(0, 2), "00000001.json.gz.tmp": "x", "foreign": "y", ".json.log": "left"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "00000001.json")); err != nil {
		t.Fatal(err)
	}
	if got := text(all(t, dir, whole)); got != numbered(0, 200) {
		t.Errorf("with a torn line: %d bytes", len(got))
	}
	w = newWriter(t, dir, opts, driver)
	fill(t, w, 200, 210)
	closeLog(t, w)
	if got := text(all(t, dir, whole)); got != numbered(0, 210) {
		t.Errorf("after the next writer: %d bytes", len(got))
	}
}

// TestDiskFull fills a small filesystem for real.
func TestDiskFull(t *testing.T) { eachFormat(t, testDiskFull) }

func testDiskFull(t *testing.T, driver string) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	log := filepath.Join(dir, "log")
	w, err := open(log, nil, driver)
	if err != nil {
		t.Fatal(err)
	}
	failed := 0
	line := strings.Repeat("x", 999) + "\n"
	for range 400 {
		if err := w.Write("stdout", []byte(line), t0); err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			failed++
		}
	}
	if failed == 0 {
		t.Fatal("nothing failed")
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	write(t, w, "stdout", "room again\n", t0)
	closeLog(t, w)
	recs := all(t, log, whole)
	notes := 0
	if driver == Local { // it says how much is missing
		recs = slices.DeleteFunc(recs, func(r Record) bool {
			note := string(r.Line) == fmt.Sprintf("[conex: %d bytes of output could not be written here]\n", failed*len(line))
			if note {
				notes++
			}
			return note
		})
		if notes != 1 {
			t.Errorf("%d notes of what is missing", notes)
		}
	}
	if len(recs) != 401-failed || string(recs[len(recs)-1].Line) != "room again\n" {
		t.Errorf("%d records after %d failures, the last %.100q", len(recs), failed, recs[len(recs)-1].Line)
	}
	for _, r := range recs[:len(recs)-1] {
		if string(r.Line) != line {
			t.Fatalf("a line of %d bytes", len(r.Line))
		}
	}
}

// stuck is a driver whose first write waits.
type stuck struct {
	Driver
	gate chan struct{}
}

func (s *stuck) Write(stream string, p []byte, t time.Time) error {
	<-s.gate
	return s.Driver.Write(stream, p, t)
}

func TestNonBlocking(t *testing.T) {
	dir := t.TempDir()
	s := &stuck{newWriter(t, dir, nil, Local), make(chan struct{})}
	b := newBuffered(s, 1000)
	for i := range 200 { // far more than the buffer holds, while nothing is written
		write(t, b, "stdout", fmt.Sprintf("line %d\n", i), t0)
	}
	close(s.gate)
	closeLog(t, b)
	recs := all(t, dir, ReadOptions{Tail: -1, Stdout: true})
	if got := text(recs); !strings.HasPrefix(numbered(0, 200), got) || len(got) < 900 || len(got) > 1000 {
		t.Errorf("kept %d bytes", len(got))
	}
	if note := text(all(t, dir, ReadOptions{Tail: -1, Stderr: true})); !strings.Contains(note, "dropped") {
		t.Errorf("no word of what was dropped: %q", note)
	}
}

// TestNonBlockingDropsTheRest: what is dropped while the last of the output is being written is told of too.
func TestNonBlockingDropsTheRest(t *testing.T) {
	dir := t.TempDir()
	s := &stuck{newWriter(t, dir, nil, Local), make(chan struct{})}
	b := newBuffered(s, 10)
	write(t, b, "stdout", "all of it\n", t0)
	for queued := 1; queued > 0; { // until it has been taken
		b.mu.Lock()
		queued = len(b.queue)
		b.mu.Unlock()
	}
	write(t, b, "stdout", "dropped\n", t0)
	close(s.gate)
	closeLog(t, b)
	if note := text(all(t, dir, ReadOptions{Tail: -1, Stderr: true})); !strings.Contains(note, "8 bytes of output were dropped") {
		t.Errorf("no word of what was dropped: %q", note)
	}
}

func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("hello\nworld"), uint64(1))
	f.Add([]byte("\xff\xfe\n\x00\u2028\"\\\n\n"), uint64(2))
	f.Add(bytes.Repeat([]byte("é"), 20000), uint64(3))
	f.Add(bytes.Repeat([]byte("0123456789\n"), 30000), uint64(4))
	f.Fuzz(func(t *testing.T, in []byte, seed uint64) {
		for _, driver := range []string{Local, JSONFile} {
			dir := t.TempDir()
			opts := map[string]string{"max-size": "64k", "max-file": "100"}
			o, err := ParseOptions(driver, opts)
			if err != nil {
				t.Fatal(err)
			}
			w := newWriter(t, dir, opts, driver)
			rng := rand.New(rand.NewPCG(seed, 0))
			var want [2]string // by stream
			for rest := in; len(rest) > 0; {
				n := 1 + rng.IntN(len(rest))
				i := rng.IntN(2)
				write(t, w, streamNames[i], string(rest[:n]), t0)
				want[i] += string(rest[:n])
				rest = rest[n:]
			}
			closeLog(t, w)
			lines := strings.Count(want[0], "\n") + strings.Count(want[1], "\n")
			for range 2 {
				for i, s := range want {
					if got := text(all(t, dir, ReadOptions{Tail: -1, Stdout: i == 0, Stderr: i == 1})); got != s {
						t.Fatalf("%s: %s: %q became %q", driver, streamNames[i], s, got)
					}
				}
				if n := rng.IntN(lines + 1); driver == Local {
					checkTail(t, dir, n)
				}
				if err := Compress(dir, o); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// checkTail compares a tail with the end of the whole.
func checkTail(t *testing.T, dir string, n int) {
	t.Helper()
	ends := func(recs []Record) (lines []string) {
		open := [2]string{}
		for _, r := range recs {
			i := 0
			if r.Stream == "stderr" {
				i = 1
			}
			if !r.Continued && open[i] != "" { // a writer's end ended it
				lines, open[i] = append(lines, open[i]), ""
			}
			open[i] += string(r.Line)
			if !r.Partial {
				lines, open[i] = append(lines, open[i]), ""
			}
		}
		for _, o := range open {
			if o != "" {
				lines = append(lines, o)
			}
		}
		return lines
	}
	want := ends(all(t, dir, whole))
	want = want[max(0, len(want)-n):]
	if got := ends(all(t, dir, ReadOptions{Tail: n})); !slices.Equal(got, want) {
		for i := range got {
			if i < len(want) && got[i] != want[i] {
				t.Logf("line %d is %.100q, not %.100q", i, got[i], want[i])
			}
		}
		t.Fatalf("tail %d: %d lines: %.200s, want %d: %.200s", n, len(got), fmt.Sprintf("%q", got), len(want), fmt.Sprintf("%q", want))
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"log":"a\n","stream":"stdout","time":"2026-01-02T03:04:05Z"}`))
	f.Add([]byte(`{"log":"\u0001\ufffd","stream":"stderr","time":"2026-01-02T03:04:05Z","raw":"/w=="}`))
	f.Add([]byte(`{"log":"a","attrs":{"x":"y"},"time":"x"}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		var own Record
		if _, ok := decodeOwn(line, nil, &own); !ok {
			var r Record
			decode(line, nil, &r)
			return
		}
		// What the fast way takes, the general way takes with the same result.
		var v struct {
			Log, Stream string
			Time        time.Time
		}
		if err := json.Unmarshal(line, &v); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if v.Log != string(own.Line) || v.Stream != own.Stream || !v.Time.Equal(own.Time) {
			t.Fatalf("%q: %+v, want %+v", line, own, v)
		}
	})
}

func BenchmarkWrite64MB(b *testing.B) {
	line := strings.Repeat("a log line as programs write them, ", 3)[:99] + "\n"
	chunk := []byte(strings.Repeat(line, 640)) // 64 KB, a pipe's worth
	for _, driver := range []string{Local, JSONFile} {
		b.Run(driver, func(b *testing.B) { benchmarkWrite(b, driver, chunk) })
	}
}

func benchmarkWrite(b *testing.B, driver string, chunk []byte) {
	b.SetBytes(1000 * int64(len(chunk)))
	for b.Loop() {
		w, err := open(b.TempDir(), nil, driver)
		if err != nil {
			b.Fatal(err)
		}
		for range 1000 {
			if err := w.Write("stdout", chunk, time.Now()); err != nil {
				b.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead64MB(b *testing.B) {
	for _, driver := range []string{Local, JSONFile} {
		b.Run(driver, func(b *testing.B) { benchmarkRead(b, driver) })
	}
}

func benchmarkRead(b *testing.B, driver string) {
	dir := b.TempDir()
	w := newWriter(b, dir, map[string]string{"max-size": "-1"}, driver)
	line := strings.Repeat("a log line as programs write them, ", 3)[:99] + "\n"
	for range 1000 {
		write(b, w, "stdout", strings.Repeat(line, 640), t0)
	}
	b.SetBytes(64000000)
	for b.Loop() {
		if err := Read(b.Context(), dir, whole, func(Record) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
