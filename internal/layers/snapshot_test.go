package layers

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"golang.org/x/sys/unix"
)

// snapshot describes a tree, one line a name, with everything that a layer must keep. Files with several names carry the
// first of them. The root itself is left out: it belongs to whoever mounts.
func snapshot(t testing.TB, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil || rel == "." {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("%06o %d:%d %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			sum, err := hashFile(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" size %d %s", st.Size, sum)
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" -> %q size %d", target, st.Size)
		case unix.S_IFCHR, unix.S_IFBLK:
			s += fmt.Sprintf(" dev %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if f, ok := first[st.Ino]; ok {
				s += fmt.Sprintf(" same as %q", f)
			} else {
				first[st.Ino] = rel
			}
			s += fmt.Sprintf(" links %d", st.Nlink)
		}
		names, err := listXattrs(p)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		sort.Strings(names)
		for _, n := range names {
			v, err := getXattr(p, n)
			if err != nil {
				return fmt.Errorf("%s: %s: %w", p, n, err)
			}
			s += fmt.Sprintf(" %s=%x", n, sha256.Sum256([]byte(v)))
		}
		out[rel] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func hashFile(p string) (string, error) {
	f, err := os.Open(p)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), err
}

// same compares two snapshots and shows the first differences.
func same(t testing.TB, got, want map[string]string) {
	t.Helper()
	shown := 0
	report := func(format string, args ...any) {
		if shown++; shown < 12 {
			t.Errorf(format, args...)
		}
	}
	for p, w := range want {
		if g, ok := got[p]; !ok {
			report("%q is missing", p)
		} else if g != w {
			report("%q:\n got %.400s\nwant %.400s", p, g, w)
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			report("%q is too much", p)
		}
	}
	if shown >= 12 {
		t.Errorf("%d differences in all", shown)
	}
}
