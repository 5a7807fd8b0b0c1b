package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lay makes a tree of path: content; content that begins with "->" is a link, "/" a folder.
func lay(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for p, content := range files {
		at := filepath.Join(root, p)
		err := os.MkdirAll(filepath.Dir(at), 0o755)
		target, link := strings.CutPrefix(content, "->")
		switch {
		case err != nil:
		case link:
			err = os.Symlink(target, at)
		case content == "/":
			err = os.MkdirAll(at, 0o755)
		default:
			err = os.WriteFile(at, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// list is lay's opposite.
func list(t *testing.T, root string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, p)
		switch {
		case err != nil || rel == ".":
		case d.IsDir():
			files[rel] = "/"
		case d.Type() == os.ModeSymlink:
			target, lerr := os.Readlink(p)
			files[rel], err = "->"+target, lerr
		case d.Type().IsRegular():
			b, rerr := os.ReadFile(p)
			files[rel], err = string(b), rerr
		default:
			files[rel] = d.Type().String()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestMergeTree(t *testing.T) {
	outside := t.TempDir()
	src, dst := t.TempDir(), t.TempDir()
	lay(t, src, map[string]string{
		"same": "new", "dir/new": "1", "dir/both": "new", "was-link": "file", "through/x": "x", "was-dir": "file", "was-file/x": "x", "link": "->new", "hard": "h",
	})
	if err := os.Link(filepath.Join(src, "hard"), filepath.Join(src, "dir/hard")); err != nil {
		t.Fatal(err)
	}
	lay(t, outside, map[string]string{"x": "outside", "victim": "outside"})
	lay(t, dst, map[string]string{
		"mine": "mine", "same": "old", "dir/both": "old", "dir/mine": "mine", "was-link": "->" + filepath.Join(outside, "victim"), "through": "->" + outside,
		"was-dir/deep/x": "old", "was-file": "old", "link": "->old", "hard": "old",
	})
	if err := os.Link(filepath.Join(dst, "same"), filepath.Join(dst, "linked")); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	when := time.Unix(1234567890, 0)
	if err := MergeTree(t.Context(), dst, f, MergeOptions{Time: &when}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"mine": "mine", "same": "new", "linked": "old", "dir": "/", "dir/new": "1", "dir/both": "new", "dir/mine": "mine", "dir/hard": "h", "hard": "h",
		"was-link": "file", "through": "/", "through/x": "x", "was-dir": "file", "was-file": "/", "was-file/x": "x", "link": "->new",
	}
	same(t, list(t, dst), want)
	same(t, list(t, outside), map[string]string{"x": "outside", "victim": "outside"})
	for _, p := range []string{"same", "dir", "link", "through/x"} {
		st, err := os.Lstat(filepath.Join(dst, p))
		if err != nil || !st.ModTime().Equal(when) {
			t.Errorf("%s has the time %v, %v", p, st.ModTime(), err)
		}
	}
	var a, b unix.Stat_t
	if unix.Lstat(filepath.Join(dst, "hard"), &a) != nil || unix.Lstat(filepath.Join(dst, "dir/hard"), &b) != nil || a.Ino != b.Ino || a.Nlink != 2 {
		t.Errorf("hard links are no longer such: %d and %d, %d names", a.Ino, b.Ino, a.Nlink)
	}

	// A second time over its own result; then as a mirror.
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	if err := MergeTree(t.Context(), dst, f, MergeOptions{}); err != nil {
		t.Fatal(err)
	}
	same(t, list(t, dst), want)
	lay(t, dst, map[string]string{"more": "->" + outside})
	if _, err := f.Seek(0, 0); err != nil {
		t.Fatal(err)
	}
	if err := MergeTree(t.Context(), dst, f, MergeOptions{Mirror: true}); err != nil {
		t.Fatal(err)
	}
	same(t, list(t, dst), list(t, src))
	same(t, list(t, outside), map[string]string{"x": "outside", "victim": "outside"})
}

func TestMergeTreeEnds(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	lay(t, src, map[string]string{"a": "new"})
	lay(t, dst, map[string]string{"a": "old"})
	f, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := MergeTree(ctx, dst, f, MergeOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a merge that was cancelled: %v", err)
	}
	same(t, list(t, dst), map[string]string{"a": "old"})
}

func same(t *testing.T, got, want map[string]string) {
	t.Helper()
	for p, c := range want {
		if got[p] != c {
			t.Errorf("%s is %q, want %q", p, got[p], c)
		}
	}
	for p, c := range got {
		if _, ok := want[p]; !ok {
			t.Errorf("%s: %q should not be there", p, c)
		}
	}
}
