package cli

import (
	"bufio"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"conex/internal/analyze"
)

func (a *app) imageTreeCommand() *cobra.Command {
	var format string
	var noTrunc bool
	cmd := &cobra.Command{
		Use: "tree [OPTIONS] [IMAGE]", Short: "Show which images share which layers", Args: a.between(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "" && format != "json" {
				return a.usageError(cmd, errors.New("--format knows json only"))
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			t, damaged := e.ImageTree(cmd.Context(), name)
			if t == nil {
				return damaged
			}
			if format == "json" {
				return errors.Join(writeOne(a.out, "json", t), damaged)
			}
			return errors.Join(a.printTree(t, name != "", !noTrunc), damaged)
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", "", "Print the tree as \"json\"")
	f.BoolVar(&noTrunc, "no-trunc", false, "Don't truncate output")
	return cmd
}

// printTree draws the tree, a line for each run of layers; a chain with the instruction of each layer.
func (a *app) printTree(t *analyze.Tree, chain, trunc bool) error {
	w := bufio.NewWriter(a.out)
	named := map[string]int{} // images by tag: those of several platforms have the same
	countTags(t.Roots, named)
	var draw func(nodes []*analyze.TreeNode, lead string, top bool)
	draw = func(nodes []*analyze.TreeNode, lead string, top bool) {
		for i, n := range nodes {
			mark, next := "├─ ", "│  "
			switch {
			case top || chain: // a chain has no branches to tell apart
				mark, next = "", ""
			case i == len(nodes)-1:
				mark, next = "└─ ", "   "
			}
			fmt.Fprintln(w, strings.TrimRight(lead+mark+treeLine(n, named, chain, trunc), " "))
			draw(n.Children, lead+next, false)
		}
	}
	draw(t.Roots, "", true)
	if !chain {
		fmt.Fprintf(w, "\n%s, %s: %s, %s without sharing\n", countOf(t.Images, "image", "images"), countOf(t.Layers, "layer", "layers"), humanSize(t.Size), humanSize(t.Unshared))
	}
	return w.Flush()
}

func countTags(nodes []*analyze.TreeNode, named map[string]int) {
	for _, n := range nodes {
		for _, img := range n.Images {
			for _, t := range img.Tags {
				named[t]++
			}
		}
		countTags(n.Children, named)
	}
}

// treeLine is a node: its last layer, sizes, and the images that end there.
func treeLine(n *analyze.TreeNode, named map[string]int, chain, trunc bool) string {
	var tags []string
	for _, img := range n.Images {
		if len(img.Tags) == 0 {
			tags = append(tags, none+" "+short(string(img.ID)))
		}
		for _, t := range img.Tags {
			if named[t] > 1 {
				t += " (" + img.Platform + ")"
			}
			tags = append(tags, t)
		}
	}
	label := strings.Join(tags, ", ")
	if len(n.Layers) == 0 {
		return "(no layers)  " + label
	}
	last := n.Layers[len(n.Layers)-1]
	id := string(last.Digest)
	if trunc {
		id = short(id)
	}
	s := fmt.Sprintf("%s  %s", id, humanSize(n.Size))
	if len(n.Layers) > 1 {
		s += fmt.Sprintf(" in %d layers", len(n.Layers))
	}
	if n.Total != n.Size {
		s += ", all " + humanSize(n.Total)
	}
	for _, l := range n.Layers {
		if l.Missing {
			s += ", missing: pull or build the image again"
			break
		}
	}
	if chain {
		made := last.Instruction
		if made == "" {
			made = "(not in the history)"
		}
		if trunc {
			made = ellipsis(made, 60)
		}
		s += "  " + made
		if last.SharedBy > 1 {
			s += fmt.Sprintf("  [in %d images]", last.SharedBy)
		}
	}
	if label != "" {
		s += "  " + label
	}
	return s
}
