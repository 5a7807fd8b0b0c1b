package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestLocalTorn cuts a log off at every byte of its last block, as a power loss may, and looks whether it is read and gone on with.
func TestLocalTorn(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, dir, nil, Local)
	write(t, w, "stdout", strings.Repeat("a line that fills a block\n", blockSize/26+1), t0)
	fill(t, w, 0, 20)
	write(t, w, "stderr", "unfinished", t0)
	closeLog(t, w)
	name := fileName(dir, 1, ".log")
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Repeat("a line that fills a block\n", blockSize/26+1) + numbered(0, 20) + "unfinished"
	for size := blockSize - 20; size <= len(whole); size += 11 {
		for _, rest := range []string{"", "\x00\x00\x00", "\x01\x05"} {
			torn := append(slices.Clone(whole[:size]), rest...)
			if err := os.WriteFile(name, torn, 0o600); err != nil {
				t.Fatal(err)
			}
			before := text(all(t, dir, ReadOptions{Tail: -1}))
			if !strings.HasPrefix(lines, before) {
				t.Fatalf("cut at %d: %d bytes that weren't written so", size, len(before))
			}
			w := newWriter(t, dir, nil, Local)
			write(t, w, "stdout", "after\n", t0)
			closeLog(t, w)
			if got := text(all(t, dir, ReadOptions{Tail: -1})); got != before+"after\n" {
				t.Fatalf("cut at %d: %.100q became %.100q", size, before[max(0, len(before)-50):], got[max(0, len(got)-50):])
			}
			if got := text(all(t, dir, ReadOptions{Tail: 1})); got != "after\n" {
				t.Fatalf("cut at %d: tail %q", size, got)
			}
		}
	}
}

// TestLocalDamage flips bytes: what is damaged is left out, up to the next block, and nothing else.
func TestLocalDamage(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, dir, nil, Local)
	const n = 40000
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "line %d\n", i)
		if i%100 == 99 {
			write(t, w, "stdout", b.String(), t0.Add(time.Duration(i)*time.Second))
			b.Reset()
		}
	}
	closeLog(t, w)
	name := fileName(dir, 1, ".log")
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int{0, 20, blockSize, blockSize + 20, blockSize + 5000, 2*blockSize - 1, len(good) - 3} {
		bad := slices.Clone(good)
		bad[at] ^= 0x41
		for _, packed := range []bool{false, true} {
			if err := os.WriteFile(name, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if packed {
				if err := os.WriteFile(fileName(dir, 2, ".log"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := pack(dir, nil); err != nil {
					t.Fatal(err)
				}
			}
			recs := all(t, dir, whole)
			if len(recs) < n-blockSize/10-200 || len(recs) > n {
				t.Errorf("byte %d damaged, packed %t: %d lines", at, packed, len(recs))
			}
			last := ""
			for _, r := range recs {
				if l := string(r.Line); len(l) < len(last) && !strings.HasPrefix(l, "line ") {
					t.Errorf("byte %d damaged: %q", at, l)
				}
			}
			all(t, dir, ReadOptions{Tail: 10})
			all(t, dir, ReadOptions{Tail: -1, Since: t0.Add(n / 2 * time.Second)})
			os.Remove(fileName(dir, 1, ".log.zst"))
			os.Remove(fileName(dir, 2, ".log"))
		}
	}
}

// TestLocalRuns keeps a run's unfinished line from the next run's first.
func TestLocalRuns(t *testing.T) {
	dir := t.TempDir()
	for i := range 3 {
		w := newWriter(t, dir, nil, Local)
		write(t, w, "stdout", "foo", t0)
		write(t, w, "stderr", "bar", t0)
		if i == 1 { // killed: nothing is closed
			f := w.(*localFile)
			if err := f.f.Close(); err != nil {
				t.Fatal(err)
			}
			f.f = nil
			continue
		}
		closeLog(t, w)
	}
	recs := all(t, dir, whole)
	if len(recs) != 6 {
		t.Fatalf("%d records: %+v", len(recs), recs)
	}
	for _, r := range recs {
		if r.Continued || !r.Partial {
			t.Errorf("%+v", r)
		}
	}
	if got := text(all(t, dir, ReadOptions{Tail: 2})); got != "foobar" {
		t.Errorf("the last run's two lines are %q", got)
	}
}

// TestLocalOrder gives lines in the order in which they ended, each with the time when it did.
func TestLocalOrder(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, dir, nil, Local)
	write(t, w, "stdout", "out", t0)
	write(t, w, "stderr", "err\n", t0.Add(time.Second))
	write(t, w, "stdout", "put\nmore", t0.Add(2*time.Second))
	var b strings.Builder
	for _, r := range all(t, dir, whole) {
		fmt.Fprintf(&b, "%s %d %q\n", r.Stream, int(r.Time.Sub(t0).Seconds()), r.Line)
	}
	if got, want := b.String(), "stderr 1 \"err\\n\"\nstdout 2 \"output\\n\"\nstdout 2 \"more\"\n"; got != want {
		t.Errorf("got\n%s", got)
	}
	if got := text(all(t, dir, ReadOptions{Tail: 1})); got != "output\nmore" { // the unfinished line comes on top
		t.Errorf("tail 1: %q", got)
	}
	if got := text(all(t, dir, ReadOptions{})); got != "" {
		t.Errorf("tail 0: %q", got)
	}
	closeLog(t, w)
}

// TestLocalLooksAtLittle reads the end and the middle of a large log, and looks at how much of the file that takes.
func TestLocalLooksAtLittle(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, dir, map[string]string{"max-size": "-1"}, Local)
	const n, each = 300, 1000
	line := strings.Repeat("x", 95)
	for i := range n {
		var b strings.Builder
		for j := range each {
			fmt.Fprintf(&b, "%s %d\n", line, i*each+j)
		}
		write(t, w, "stdout", b.String(), t0.Add(time.Duration(i)*time.Second))
	}
	closeLog(t, w)
	for _, packed := range []bool{false, true} {
		if packed {
			if err := os.WriteFile(fileName(dir, 2, ".log"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := pack(dir, nil); err != nil {
				t.Fatal(err)
			}
		}
		for what, o := range map[string]ReadOptions{
			"tail":  {Tail: 5},
			"since": {Tail: -1, Since: t0.Add((n - 1) * time.Second)},
			"until": {Tail: -1, Until: t0.Add(-time.Second)},
		} {
			s, err := openSource(dir, 1)
			if err != nil {
				t.Fatal(err)
			}
			local := s.(*localSource)
			c := &counting{blocks: local.b}
			local.b = c
			r := &reader{dir: dir, o: o, fn: func(Record) error { return nil }}
			if o.Tail >= 0 {
				_, r.skip, err = s.tail(o.Tail)
			} else {
				err = s.since(o.Since)
			}
			if err == nil {
				err = s.drain(t.Context(), r)
			}
			if err != nil && !errors.Is(err, errUntil) {
				t.Fatal(err)
			}
			if c.heads > 30 || c.loads > 6 {
				t.Errorf("%s, packed %t: read %d heads and %d blocks", what, packed, c.heads, c.loads)
			}
			s.close()
		}
	}
}

type counting struct {
	blocks
	heads, loads int
}

func (c *counting) head(k int64) (blockHead, error) { c.heads++; return c.blocks.head(k) }
func (c *counting) load(k int64, buf []byte, n int) (int, error) {
	c.loads++
	return c.blocks.load(k, buf, n)
}

// TestLocalIsZstandard unpacks a compressed file with zstd.
func TestLocalIsZstandard(t *testing.T) {
	zstd, err := exec.LookPath("zstd")
	if err != nil {
		t.Skip("zstd is not installed")
	}
	dir := t.TempDir()
	w := newWriter(t, dir, map[string]string{"max-size": "1m", "max-file": "3"}, Local)
	for range 20 {
		write(t, w, "stdout", strings.Repeat("a line\n", 20000), t0)
	}
	closeLog(t, w)
	plain, err := os.ReadFile(fileName(dir, 1, ".log"))
	if err != nil {
		t.Fatal(err)
	}
	if err := pack(dir, nil); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(zstd, "-dc", fileName(dir, 1, ".log.zst")).Output()
	if err != nil || !bytes.Equal(out, plain) {
		t.Errorf("%d bytes, want %d: %v", len(out), len(plain), err)
	}
}

// TestPackerWaitsForQuiet compresses by itself, not while there is a flood, and not what is gone.
func TestPackerWaitsForQuiet(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, dir, map[string]string{"max-size": "1m", "max-file": "3"}, Local)
	for range 50 {
		write(t, w, "stdout", strings.Repeat("a line\n", 20000), t0)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, err := os.Stat(fileName(dir, 6, ".log.zst")); err != nil && t.Context().Err() == nil; _, err = os.Stat(fileName(dir, 6, ".log.zst")) {
			time.Sleep(10 * time.Millisecond)
		}
	}()
	<-done
	closeLog(t, w)
	left, err := filepath.Glob(filepath.Join(dir, "0*"))
	if err != nil || len(left) != 3 {
		t.Errorf("%v, %v", left, err)
	}
}

// FuzzLocal reads any bytes as a log's files.
func FuzzLocal(f *testing.F) {
	dir := f.TempDir()
	w, err := open(dir, map[string]string{"max-size": "200k"}, Local)
	if err != nil {
		f.Fatal(err)
	}
	for range 30 {
		if err := w.Write("stdout", []byte(strings.Repeat("a line\n", 2000)), t0); err != nil {
			f.Fatal(err)
		}
	}
	if err := errors.Join(w.Write("stderr", []byte("no end"), t0), w.Close(), pack(dir, nil)); err != nil {
		f.Fatal(err)
	}
	for _, seq := range []uint64{1, 3} {
		for i, suffix := range []string{".log", ".log.zst"} {
			if b, err := os.ReadFile(fileName(dir, seq, suffix)); err == nil {
				f.Add(b, i == 1, 3)
				f.Add(b[:len(b)-7], i == 1, 3)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, packed bool, n int) {
		dir := t.TempDir()
		suffix := ".log"
		if packed {
			suffix = ".log.zst"
		}
		if err := os.WriteFile(fileName(dir, 1, suffix), data, 0o600); err != nil {
			t.Fatal(err)
		}
		size := 0
		count := func(r Record) error { size += len(r.Line); return nil }
		for _, o := range []ReadOptions{whole, {Tail: max(0, n)}, {Tail: -1, Since: t0}, {Tail: -1, Until: t0}} {
			if err := Read(context.Background(), dir, o, count); err != nil && !strings.Contains(err.Error(), "version") && !errors.Is(err, errFormat) {
				t.Fatal(err)
			}
		}
		if !packed && size > 4*len(data) {
			t.Fatalf("%d bytes of %d", size, len(data))
		}
		w, err := open(dir, nil, Local)
		if err != nil {
			return // another version
		}
		if err := errors.Join(w.Write("stdout", []byte("new\n"), t0), w.Close()); err != nil {
			t.Fatal(err)
		}
		if err := pack(dir, nil); err != nil {
			t.Fatal(err)
		}
		if got := ""; Read(context.Background(), dir, ReadOptions{Tail: 1}, func(r Record) error { got += string(r.Line); return nil }) == nil && !strings.HasSuffix(got, "new\n") {
			t.Fatalf("after a new line the last one is %.100q", got)
		}
	})
}

// TestOlderLogs goes on after a log in the format that was the default once.
func TestOlderLogs(t *testing.T) {
	dir := t.TempDir()
	w := newWriter(t, dir, map[string]string{"max-size": "10k"}, JSONFile)
	fill(t, w, 0, 300)
	closeLog(t, w)
	if err := pack(dir, nil); err != nil {
		t.Fatal(err)
	}
	w = newWriter(t, dir, map[string]string{"max-size": "3k", "max-file": "100"}, Local)
	fill(t, w, 300, 600)
	closeLog(t, w)
	for range 2 {
		for _, n := range []int{1, 299, 300, 301, 450, 600} {
			if got, want := text(all(t, dir, ReadOptions{Tail: n})), numbered(600-n, 600); got != want {
				t.Errorf("tail %d: %d bytes, want %d", n, len(got), len(want))
			}
		}
		for _, from := range []int{0, 150, 299, 300, 599} {
			if got, want := text(all(t, dir, ReadOptions{Tail: -1, Since: t0.Add(time.Duration(from) * time.Second)})), numbered(from, 600); got != want {
				t.Errorf("since %d: %d bytes, want %d", from, len(got), len(want))
			}
		}
		if err := pack(dir, nil); err != nil {
			t.Fatal(err)
		}
	}
}
