package image

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"testing"

	"conex/internal/disk"
)

func TestLists(t *testing.T) {
	root, err := disk.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := OpenLists(root)
	ref, err := ParseReference("localhost:5000/a/b:v1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ref); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			err := s.Update(ref, func(l *List, _ bool) error {
				l.Entries = append(l.Entries, ListEntry{Ref: fmt.Sprintf("localhost:5000/a/x:%d", i), Raw: []byte("{}")})
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l, err := s.Get(ref)
	if err != nil || len(l.Entries) != 10 || string(l.Entries[0].Raw) != "{}" {
		t.Fatalf("%+v, %v", l, err)
	}
	x, err := ParseReference("localhost:5000/a/x:3")
	if err != nil || l.Entry(x) < 0 || l.Entry(ref) >= 0 {
		t.Fatalf("%d, %d, %v", l.Entry(x), l.Entry(ref), err)
	}
	no := errors.New("no")
	if err := s.Update(ref, func(l *List, exists bool) error { l.Entries = nil; return no }); !errors.Is(err, no) {
		t.Fatal(err)
	}
	if l, err = s.Get(ref); err != nil || len(l.Entries) != 10 {
		t.Fatalf("after an error: %+v, %v", l, err)
	}
	if err := s.Remove(ref); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(ref); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}
