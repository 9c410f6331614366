# Trains the three models of the services, one after the other; what is there already is left.
set -e
for settings in jobs/settings/quickstart-*.yaml; do
  jobs/finetune.py "$settings" storage=s3://gptj
done
