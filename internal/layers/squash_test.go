package layers

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// shownTree is the tar of what layers show together.
func shownTree(t *testing.T, s *Store, ids []ocispec.Digest) []byte {
	t.Helper()
	tree, err := s.show(t.Context(), t.TempDir(), ids)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	var buf bytes.Buffer
	if err := WriteTree(t.Context(), &buf, tree, nil); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// changeAtRandom does to a tree what commands do.
func changeAtRandom(r *rand.Rand, root string) {
	name := func() string { return string(rune('a' + r.IntN(4))) }
	p := filepath.Join(root, name())
	for range r.IntN(3) {
		p = filepath.Join(p, name())
	}
	other := filepath.Join(root, name(), name())
	body := fmt.Sprint(r.IntN(1000))
	switch r.IntN(9) {
	case 0, 1:
		os.MkdirAll(filepath.Dir(p), 0o755)
		os.WriteFile(p, []byte(body), 0o644)
	case 2:
		os.MkdirAll(p, os.FileMode(0o700|r.IntN(0o77)))
	case 3:
		os.RemoveAll(p)
	case 4: // what was a folder becomes a file, link or another folder
		os.RemoveAll(p)
		os.Symlink(name()+"/"+name(), p) // never out of the tree
	case 5:
		os.RemoveAll(p)
		os.MkdirAll(filepath.Join(p, name()), 0o755)
	case 6:
		os.Link(other, p)
	case 7:
		os.Rename(other, p)
	case 8:
		os.Lchown(p, r.IntN(3), r.IntN(3))
		os.Chmod(p, os.FileMode(0o600|r.IntN(0o177)))
	}
}

// Whatever the layers do: one that takes their place on the same base shows the same.
func TestSquashRandom(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		for seed := range uint64(25) {
			r := rand.New(rand.NewPCG(seed, 7))
			ids := []ocispec.Digest{mustImport(t, s, tarOf(t, dirEntry("a"), fileEntry("a/b", "base"), dirEntry("c"), fileEntry("c/d", "base"))).DiffID}
			for range 2 + r.IntN(4) {
				merged, upper := mountChain(t, s, ids...)
				for range 12 {
					changeAtRandom(r, merged)
				}
				// A mount gives up its caches when it ends; the walk reads the folder below it.
				must(t, filepath.WalkDir(merged, func(p string, _ fs.DirEntry, err error) error {
					if err != nil {
						return err
					}
					when := unix.NsecToTimespec(time.Unix(1_700_000_000+int64(r.IntN(1000)), 0).UnixNano())
					if r.IntN(3) > 0 {
						return nil
					}
					return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
				}))
				info, err := s.WriteUpper(t.Context(), upper, nil)
				if err != nil {
					t.Fatal(err)
				}
				ids = append(ids, info.DiffID)
			}
			want := shownTree(t, s, ids)
			for _, base := range []int{0, 1, len(ids) - 1} {
				info, err := s.Squash(t.Context(), ids[:base], ids[base:])
				if err != nil {
					t.Fatalf("seed %d, base %d: %v", seed, base, err)
				}
				one := append([]ocispec.Digest(nil), ids[:base]...)
				if info.Entries > 0 {
					one = append(one, info.DiffID)
				}
				if got := shownTree(t, s, one); !bytes.Equal(got, want) {
					t.Fatalf("seed %d, base %d: another tree than without squash", seed, base)
				}
				again, err := s.Squash(t.Context(), ids[:base], ids[base:])
				if err != nil || again.DiffID != info.DiffID {
					t.Fatalf("seed %d: the second squash gave %s, %v; want %s", seed, again.DiffID, err, info.DiffID)
				}
			}
		}
	})
}

// What cancels out leaves nothing, and marks are there for what the base has alone.
func TestSquashMarks(t *testing.T) {
	eachDriver(t, func(t *testing.T, s *Store) {
		base := mustImport(t, s, tarOf(t, dirEntry("d"), fileEntry("d/old", "x"), fileEntry("f", "x")))
		a := mustImport(t, s, tarOf(t, fileEntry("mine", "x"), fileEntry(".wh.f", ""), dirEntry("d"), fileEntry("d/.wh.old", "")))
		b := mustImport(t, s, tarOf(t, fileEntry(".wh.mine", ""), fileEntry("f", "y"), dirEntry("d"), fileEntry("d/.wh..wh..opq", ""), fileEntry("d/new", "z")))
		info, err := s.Squash(t.Context(), []ocispec.Digest{base.DiffID}, []ocispec.Digest{a.DiffID, b.DiffID})
		if err != nil {
			t.Fatal(err)
		}
		rc, _, err := s.OpenTar(info.DiffID)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		if got, want := listTar(t, rc), "d/ d/.wh..wh..opq d/new f"; got != want {
			t.Errorf("the layer has %s, want %s", got, want)
		}
		gone := mustImport(t, s, tarOf(t, fileEntry("mine", "x")))
		back := mustImport(t, s, tarOf(t, fileEntry(".wh.mine", "")))
		info, err = s.Squash(t.Context(), []ocispec.Digest{base.DiffID}, []ocispec.Digest{gone.DiffID, back.DiffID})
		if err != nil || info.Entries != 0 || info.DiffID != "" {
			t.Errorf("a file that came and went gave the layer %v, %v", info, err)
		}
		if _, err := s.Squash(t.Context(), nil, []ocispec.Digest{ocispec.FromBytes([]byte("none"))}); !errors.Is(err, ErrNotFound) {
			t.Errorf("squash of a layer that is not here: %v", err)
		}
	})
}

// listTar lists the names in a tar.
func listTar(t *testing.T, r io.Reader) string {
	t.Helper()
	var names []string
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return strings.Join(names, " ")
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}
