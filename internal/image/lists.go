package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"conex/internal/disk"
	"conex/internal/ocispec"
)

// Lists are the manifest lists that were made here and not yet pushed, files of manifests/:
//
//	manifests/<escaped reference>.json  {"reference","entries":[{"ref","descriptor","raw"}]}
//	manifests/lock                      flock: every change holds it; readers take no lock
type Lists struct{ root *disk.Root }

// List is one of them.
type List struct {
	// Reference is its full name.
	Reference string      `json:"reference"`
	Entries   []ListEntry `json:"entries"`
}

// ListEntry is an image of a list.
type ListEntry struct {
	// Ref is the image's full reference.
	Ref string `json:"ref"`
	// Descriptor names its manifest and says for which platform it is.
	Descriptor ocispec.Descriptor `json:"descriptor"`
	// Raw is the manifest.
	Raw []byte `json:"raw"`
}

// Entry returns the place of an image in the list, -1 if it is not there.
func (l *List) Entry(ref Reference) int {
	for i, e := range l.Entries {
		if e.Ref == ref.String() {
			return i
		}
	}
	return -1
}

// OpenLists returns the lists of a root.
func OpenLists(root *disk.Root) Lists { return Lists{root} }

func (s Lists) path(ref Reference) string { return s.root.Path("manifests", fileName(ref)) }

// Get returns a list. The error satisfies errors.Is(err, fs.ErrNotExist) if there is none.
func (s Lists) Get(ref Reference) (List, error) {
	var l List
	if err := disk.ReadJSON(s.path(ref), &l); err != nil {
		return l, err
	}
	if l.Reference != ref.String() {
		return l, fmt.Errorf("read %s: holds the list %q", s.path(ref), l.Reference)
	}
	return l, nil
}

// Update gives a list, or one without entries where there is none, to fn, and stores what fn makes of it. No other update of any list
// goes on meanwhile. If fn returns an error nothing is stored.
func (s Lists) Update(ref Reference, fn func(l *List, exists bool) error) error {
	lock, err := disk.Acquire(s.root.Path("manifests", "lock"))
	if err != nil {
		return err
	}
	defer lock.Release()
	l, err := s.Get(ref)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	exists := err == nil
	l.Reference = ref.String()
	if err := fn(&l, exists); err != nil {
		return err
	}
	return disk.WriteJSON(s.path(ref), l, disk.Durable)
}

// Remove forgets a list. The error satisfies errors.Is(err, fs.ErrNotExist) if there is none.
func (s Lists) Remove(ref Reference) error {
	lock, err := disk.Acquire(s.root.Path("manifests", "lock"))
	if err != nil {
		return err
	}
	defer lock.Release()
	return os.Remove(s.path(ref))
}
