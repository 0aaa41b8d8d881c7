# Put the runs beside each other.
source "$(dirname "$0")/tiny.sh"
leanmill report runs/base runs/sparse runs/student --out comparison.html
grep -q "techniques.nm_sparsity" comparison.html
leanmill report runs/sparse
leanmill ckpt inspect runs/student
